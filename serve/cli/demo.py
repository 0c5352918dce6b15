"""`mm demo`: a page that compares the full and the reduced answer."""

from __future__ import annotations

from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, check_model, need
from serve.cli.log import log_to_stderr
from serve.cli.options import build_config, setting_options
from serve.config import ServeConfig

SETTINGS = (
    "model",
    "reducer",
    "keep_ratio",
    "lenient_reducers",
    "drafter",
    "allow_drafter",
    "device",
    "dtype",
    "threads",
)


@click.command()
@click.option("--url", help="A running server; without it one is started here.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the page.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Port of the page.")
@click.option("--allow-host", multiple=True, help="Name by which the page may be reached, beside addresses; repeat.")
@click.option("--allow-origin", multiple=True, help="Address of the page behind a proxy that changes Host; repeat.")
@click.option("--api-key", envvar="MM_API_KEY", help="Key that the server asks for.")
@setting_options(ModelConfig, only=SETTINGS)
def demo(
    settings: dict[str, Any],
    url: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    **options: Any,
) -> None:
    """Open a page that compares the full and the reduced answer and shows which tokens were kept and which drafted.

    Without a drafter option the page offers the model's own drafters and those that need no training.
    """
    config = build_config(ModelConfig, settings)
    if url is None:
        check_early(config)
    from serve.page.choices import with_drafters
    from serve.page.launch import DemoConfig, run_demo

    log_to_stderr()
    need("gradio", "demo")
    if url is None:
        check_model(config)
        config = with_drafters(config)
    names = {"allowed_hosts": allow_host, "allowed_origins": allow_origin}
    run_demo(DemoConfig(url=url, server=ServeConfig(model=config), **names, **options))
