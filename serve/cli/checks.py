"""What is checked before anything is loaded: packages, the port, and whether the model and its plugins exist."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from mm.errors import InvalidOption
from mm.models.shipped import REAL_MODEL, limits_of
from mm.settings import settings_of

if TYPE_CHECKING:
    from mm.config import ModelConfig


def need(package: str, extra: str) -> None:
    """End the command with the name of the extra that installs a missing package."""
    if importlib.util.find_spec(package) is None:
        click.echo(f"mm: this command needs {package}: pip install 'mm-serving[{extra}]'", err=True)
        sys.exit(1)


def check_port(host: str, port: int) -> None:
    """Refuse a taken port before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        click.echo(
            f"mm: cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port", err=True
        )
        raise SystemExit(1) from None


def check_no_process_settings(given: Iterable[str]) -> None:
    """Refuse the setting that only means something in one process, where Ray serves."""
    if "header_timeout_s" in given:
        what = "belongs to --in-process: on Ray the proxy reads headers; leave it out"
        raise InvalidOption("serve", "header_timeout_s", what)


def check_no_ray_settings(cls: type, given: Iterable[str]) -> None:
    """Refuse settings that only mean something on Ray, where one process serves without it."""
    ray_only = {one.name for one in settings_of(cls) if one.bounds.ray_only}
    if wrong := next((name for name in given if name in ray_only), None):
        raise InvalidOption("serve", wrong, "belongs to Ray, and --in-process serves without it; leave one of them out")


def warn_of_limits(model: str) -> None:
    """Say on stderr what a shipped model cannot do, and name one that can."""
    if limits := limits_of(model):
        click.echo(f"mm: {limits} For those give a general model, such as {REAL_MODEL}.", err=True)


def check_model(config: ModelConfig) -> None:
    """Refuse a wrong model, reducer or drafter in one line, before replicas fail to start over it."""
    from mm.models.checkpoint import find, read_config
    from mm.plugins.registry import get
    from mm.plugins.spec import bind, build_drafter, configured_reducer

    folder = find(config.model)
    read_config(folder)
    bind(configured_reducer(config), folder)
    for name in config.reducers.allowed:
        get("reducer", name)
    for drafter in (config.speculation.drafter, *config.speculation.drafters):
        build_drafter(drafter)
