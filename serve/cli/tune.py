"""`mm tune`: how many visual tokens each layer of the decoder needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, need
from serve.cli.options import build_config, setting_options


@click.command()
@click.argument("model")
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option(
    "--budget", type=float, help="FLOPs of the prefill / FLOPs with every visual token, for the sigmoid search."
)
@click.option("--search", default="sigmoid", show_default=True, help="sigmoid (under a budget) or greedy (no loss).")
@click.option("--tolerance", type=float, default=0.01, show_default=True, help="Share of items that greedy may lose.")
@click.option(
    "--trials",
    "num_trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Schedules that the sigmoid search tries.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("reducer.json"),
    show_default=True,
    help="File of the reducer; repeat it to resume.",
)
@click.option("--task", multiple=True, help="Only this task; repeat for several.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only the first items of each task and wording, this many."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Frames sampled from a clip, evenly over its length.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer.")
@setting_options(ModelConfig, only=("device", "dtype", "threads"))
def tune(model: str, settings: dict[str, Any], search: str, task: tuple[str, ...], frames: int, **options: Any) -> None:
    """Search how many visual tokens each layer needs; run again to resume.

    MODEL is "tiny" (the shipped model), a folder, or a hub name. DATA is a Parquet file as `mm eval` reads it; without
    one the shipped set is used. The result is a file for --reducer.
    """
    for package in ("pyarrow", "rich", "transformers"):
        need(package, "batch")
    if search not in ("greedy", "sigmoid"):
        raise click.BadParameter(f"was {search!r}; allowed: greedy, sigmoid", param_hint="--search")
    if search == "sigmoid":
        need("sklearn", "tune")
    config = build_config(ModelConfig, settings, model=model, frames=frames)
    check_early(config)
    from serve.tuning.command import Tuning, run_tuning

    run_tuning(Tuning(search=search, tasks=task, model=config, num_frames=frames, **options))
