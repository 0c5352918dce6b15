"""`mm caption`: images and clips to lines of JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mm.config import ModelConfig
from serve.cli.checks import check_early, need, warn_of_limits
from serve.cli.options import build_config, setting_options
from serve.cli.run_batch import ROW_NAMES, is_rows, row_options, start

FOR_SERVERS = ("cache_bytes", "max_waiting", "allow_drafter", "allow_reducer", "min_keep_ratio")
"""Settings of a model that say what many clients may do; a job asks for itself."""


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the results; repeat it to resume."
)
@click.option("--prompt", help="Question about every item; a description is asked for when not given.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Longest caption.")
@click.option("--pattern", multiple=True, help='Names to take from folders, such as "*.png"; repeat for several.')
@click.option("--limit", type=int, help="Take only this many of the items, the first ones.")
@click.option("--retry-failed", is_flag=True, help="Try failed items again.")
@click.option("--restart", is_flag=True, help="Discard the folder's earlier results.")
@click.option("--quiet", is_flag=True, help="Show no progress, only errors and failed items.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line with the counts.")
@row_options
@setting_options(ModelConfig, leave_out=FOR_SERVERS)
def caption(
    inputs: tuple[str, ...],
    settings: dict[str, Any],
    pattern: tuple[str, ...],
    **options: Any,
) -> None:
    """Caption images and clips into JSON lines; run again to resume.

    INPUTS are files, folders and glob patterns of images and clips, which give captions.jsonl. Tables, archives and
    datasets, and --to FORM, give shards of records instead, as `mm run-batch` does. The exit code is 0, 3 (some items
    failed) or 1 (none could be done).
    """
    context = click.get_current_context()
    given = {name for name in ROW_NAMES if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given - {"api_key"} or any(is_rows(text) for text in inputs):
        sys.exit(start(settings, {"inputs": inputs, "patterns": pattern, **options}, "caption"))
    options = {name: value for name, value in options.items() if name not in ROW_NAMES}
    need("transformers", "batch")
    model = build_config(ModelConfig, settings, allow_paths=True)
    check_early(model)
    if not options["quiet"]:
        warn_of_limits(model.model)
    from serve.jobs.caption import run_caption
    from serve.jobs.job import CaptionJob

    sys.exit(run_caption(CaptionJob(inputs=inputs, model=model, patterns=pattern, **options)))
