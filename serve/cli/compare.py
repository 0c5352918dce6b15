"""`mm compare`: one question, with every visual token and with each reducer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, need
from serve.cli.options import build_config, setting_options

DEFAULT_REDUCERS = ("divprune:keep_ratio=0.25",)


@click.command()
@click.argument("file", metavar="IMAGE", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The question.")
@click.option("--reducer", multiple=True, help="Reducer to compare; repeat for several. `none` is always compared.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for pictures of the kept tokens and for comparison.json."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@setting_options(ModelConfig, only=("model", "device", "dtype", "frames", "fps", "threads"))
def compare(file: Path, reducer: tuple[str, ...], settings: dict[str, Any], **options: Any) -> None:
    """Ask once with every visual token and once with each reducer.

    IMAGE is a picture or a clip. Shown are the answers, tokens, times, memory and the tokens that were kept.
    """
    need("transformers", "batch")
    model = build_config(ModelConfig, settings, cache_bytes=0, prefix_caching=False, allow_paths=True)
    check_early(model)
    from serve.compare.command import run_compare
    from serve.compare.run import Comparison

    run_compare(Comparison(path=file, reducers=reducer or DEFAULT_REDUCERS, model=model, **options))
