"""What is checked before anything is loaded: packages, the port, and whether the model and its plugins exist."""

from __future__ import annotations

import importlib.util
import socket
import sys
from typing import TYPE_CHECKING

import click

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


def check_model(config: ModelConfig) -> None:
    """Refuse a wrong model, reducer or drafter in one line, before replicas fail to start over it."""
    from mm.models.checkpoint import find, read_config
    from mm.plugins.registry import get
    from mm.plugins.spec import build_drafter, configured_reducer

    read_config(find(config.model))
    configured_reducer(config)
    for name in config.reducers.allowed:
        get("reducer", name)
    for drafter in (config.speculation.drafter, *config.speculation.drafters):
        build_drafter(drafter)
