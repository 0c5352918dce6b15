"""`mm serve`: a model through OpenAI-compatible HTTP endpoints."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from serve.cli.checks import (
    check_early,
    check_gpus,
    check_model,
    check_no_process_settings,
    check_no_ray_settings,
    check_port,
    need,
    warn_of_limits,
)
from serve.cli.log import log_to_stderr
from serve.cli.options import EPILOG, build_config, config_option, print_settings, setting_options
from serve.config import ServeConfig, check_split
from serve.deployments.environment import LOCAL_HOSTS

SAMPLE = Path(__file__).resolve().parents[2] / "demos" / "samples" / "many_shapes.png"
QUESTION = "What color is the star?"


@click.command(epilog=EPILOG)
@setting_options(ServeConfig, model_argument=True)
@click.option("--in-process", is_flag=True, help="Serve in one process, without Ray.")
@config_option(ServeConfig)
@click.option("--print-config", is_flag=True, help="Print the settings and where they come from, and exit.")
def serve(settings: dict[str, Any], in_process: bool, print_config: bool) -> None:
    """Serve a model through OpenAI-compatible endpoints, on Ray Serve or in one process.

    MODEL is "tiny" (the shipped model, and the default), a folder, or a hub name.
    """
    config = build_config(ServeConfig, settings)
    if print_config:
        print_settings(config)
        return
    log_to_stderr()
    if in_process:
        check_no_ray_settings(ServeConfig, settings)
    else:
        check_no_process_settings(settings)
        check_split(config)
        need("ray", "serve")
        if config.address is None:
            check_gpus(config)
    need("fastapi", "server")
    if config.ui:
        need("gradio", "demo")
    if config.address is None:
        config = replace(config, port=check_port(config.host, config.port))
    check_early(config.model, is_local=config.address is None)
    where = "in one process" if in_process else "on Ray Serve"
    click.echo(f"mm: {config.model.model} on {config.model.device}, {where}; importing torch", err=True)
    # On a cluster, replicas compute on other nodes than this one.
    check_model(config.model if config.address is None else replace(config.model, device="cpu"))
    if config.host not in LOCAL_HOSTS and not config.api_keys:
        click.echo(f"mm: listening on {config.host} without an API key: everyone who can reach it may use it", err=True)
    _run(config, in_process)


def _run(config: ServeConfig, in_process: bool) -> None:
    waiting = Waiting()
    with waiting:
        _start(config, in_process, waiting)


def _start(config: ServeConfig, in_process: bool, waiting: Waiting) -> None:
    if in_process:
        click.echo(f"mm: loading {config.model.model} into this process", err=True)
        from serve.api.server import run_in_process

        run_in_process(config, partial(_print_ready, waiting, config), partial(_print_bounds, config))
    else:
        from serve.deployments.launch import run_on_ray
        from serve.memory import ray_bounds_text

        click.echo(f"mm: {ray_bounds_text(config)}", err=True)
        where = "starting Ray" if config.address is None else f"connecting to the Ray cluster at {config.address}"
        click.echo(f"mm: {where} and loading {config.model.model}; this takes up to a minute", err=True)
        run_on_ray(config, partial(_print_ready, waiting))


def _print_bounds(config: ServeConfig, kv_bytes: int) -> None:
    from serve.memory import bounds_text

    click.echo(f"mm: {bounds_text(config, kv_bytes)}", err=True)


class Waiting:
    """Says every ten seconds that the server is still starting, until it is ready or the context ends."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self._interval_s, self._start, self._is_over = interval_s, time.monotonic(), threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(self._interval_s):
            click.echo(f"mm: still loading, {time.monotonic() - self._start:.0f} s so far", err=True)


def _print_ready(waiting: Waiting, config: ServeConfig) -> None:
    """Print that requests are answered, what a shipped model cannot do, and a command that sends the first one."""
    waiting.end()
    host = f"[{config.host}]" if ":" in config.host else config.host
    url, name = f"http://{host}:{config.port}{config.route_prefix.rstrip('/')}", config.names[0]
    content = f'{{"type": "text", "text": "{QUESTION}"}}'
    if SAMPLE.is_file():
        image = f"data:image/png;base64,$(base64 < '{SAMPLE}' | tr -d '\\n')"
        content += f', {{"type": "image_url", "image_url": {{"url": "{image}"}}}}'
    key = '-H "Authorization: Bearer $MM_API_KEY" ' if config.api_keys else ""
    warn_of_limits(config.model.model)
    if config.ui:
        click.echo(f"mm: the demo page is at {url}/ui", err=True)
    click.echo(
        f"mm: ready at {url}, serving {name}. Try:\n\n"
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' {key}-d @- <<EOF\n"
        f'{{"model": "{name}", "max_tokens": 64, "messages": [{{"role": "user", "content": [{content}]}}]}}\nEOF\n'
    )
