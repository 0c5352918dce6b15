"""`mm bench`: measures this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, need
from serve.cli.options import build_config, setting_options

SETTINGS = ("device", "dtype", "threads", "quantize", "kv_cache_gb", "max_num_seqs", "max_batch_tokens", "reducer")


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.argument("model", default="tiny")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file of the curves, for `mm plan`.")
@click.option(
    "--side", "sides_px", type=click.IntRange(min=8), multiple=True, default=(224,), help="Side of a picture; repeat."
)
@click.option("--repeats", type=click.IntRange(min=3), default=5, show_default=True, help="Of each measurement.")
@click.option(
    "--hand-off/--no-hand-off",
    default=True,
    show_default=True,
    help="Measure data that moves between replicas, on Ray.",
)
@setting_options(ModelConfig, only=SETTINGS)
def calibrate(model: str, settings: dict[str, Any], **options: Any) -> None:
    """Measure how long encode, prefill, decode and the front end take, as curves for `mm plan`.

    MODEL is "tiny" (the shipped model), a folder, or a hub name. On a CPU with --threads 1 processor time is measured,
    which other programs do not disturb; else it is wall time.
    """
    need("fastapi", "server")
    need("httpx", "models")
    if options["hand_off"]:
        need("ray", "serve", or_else="--no-hand-off")
    config = build_config(ModelConfig, settings, model=model)
    check_early(config)
    from serve.planning.calibrate import Calibration, run_calibration

    run_calibration(Calibration(model=config, **options))
