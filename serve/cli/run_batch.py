"""`mm run-batch`: questions about the rows of tables, archives, datasets and folders, or the requests of a batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mm.config import ModelConfig
from serve.cli.checks import check_early, need, warn_of_limits
from serve.cli.options import build_config, setting_options

FOR_SERVERS = ("cache_bytes", "max_waiting", "allow_drafter", "allow_reducer", "min_keep_ratio")
"""Settings of a model that say what many clients may do; a job asks for itself."""
FORMS = ("jsonl", "parquet", "webdataset", "txt", "json", "openai")


def row_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a job over rows."""
    for option in reversed(ROW_OPTIONS):
        command = option(command)
    return command


ROW_OPTIONS = (
    click.option("--to", "form", type=click.Choice(FORMS), help="Form of the results; openai for a batch, else jsonl."),
    click.option("--prompts", type=click.Path(path_type=Path), help="YAML or JSON file with several named prompts."),
    click.option("--window", "window_s", type=float, metavar="SECONDS", help="Ask about each window of a clip apart."),
    click.option("--schema", type=click.Path(path_type=Path), help="File with a JSON schema that answers have to fit."),
    click.option("--columns", help="Names of a table's columns, such as id=uid,image=jpg,prompt=question."),
    click.option(
        "--workers", type=int, help="Answer in this many processes of this machine, each with an engine of its own."
    ),
    click.option("--url", help="Ask this OpenAI-compatible server instead of loading a model here."),
    click.option("--api-key", envvar="MM_API_KEY", help="Key that the server asks for."),
    click.option("--served-model", help="The model's name on that server; its first one when not given."),
    click.option(
        "--concurrency",
        type=int,
        default=32,
        show_default=True,
        help="Requests under way at a time at most, of each worker.",
    ),
    click.option("--shard-rows", type=int, default=512, show_default=True, help="Rows of one shard of the results."),
    click.option("--timeout-s", type=float, default=600.0, show_default=True, help="Longest wait for one answer."),
    click.option("--skip-existing", is_flag=True, help="With --to txt or json: leave rows alone that have a file."),
    click.option(
        "--dedup",
        type=click.Choice(["exact", "near", "none"]),
        default="exact",
        show_default=True,
        help="Ask once about rows of equal content, or also about pictures that look the same.",
    ),
    click.option(
        "--progress", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Its form."
    ),
)
"""Options of a job over rows, which `mm caption` has too."""
ROW_NAMES = frozenset(
    {
        *(
            "form",
            "prompts",
            "schema",
            "columns",
            "workers",
            "url",
            "api_key",
            "served_model",
            "concurrency",
            "shard_rows",
        ),
        *("window_s", "timeout_s", "skip_existing", "dedup", "progress"),
    }
)
"""Their names as arguments."""


def is_rows(path: str) -> bool:
    """Whether an input holds rows and is no picture, clip, or folder of these."""
    from serve.jobs.batch.sources import is_rows as check

    return check(path)


@click.command(name="run-batch")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results; repeat to resume.")
@click.option("--prompt", help="Question about every row; a description is asked for when not given.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Longest answer.")
@click.option("--pattern", "patterns", multiple=True, help='Names to take from folders, such as "*.png"; repeat.')
@click.option("--limit", type=int, help="Take only this many rows, the first ones.")
@click.option("--retry-failed", is_flag=True, help="Try failed rows again.")
@click.option("--restart", is_flag=True, help="Discard the folder's earlier results.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line with the counts at the end.")
@row_options
@setting_options(ModelConfig, leave_out=FOR_SERVERS)
def run_batch(settings: dict[str, Any], **options: Any) -> None:
    """Ask about every row of INPUTS; run again to resume.

    INPUTS are Parquet, JSONL, CSV, text lists, WebDataset tars, folders of Hugging Face datasets, OpenAI batch files,
    and folders, files and globs of images and clips. A table has the columns id (else the row's number) and image,
    video or media (bytes, paths or addresses), and may have prompt, reducer, keep_ratio and max_visual_tokens. The exit
    code is 0, 3 (some rows failed) or 1 (it could not go on).
    """
    sys.exit(start(settings, options, "run-batch"))


def start(settings: dict[str, Any], options: dict[str, Any], name: str) -> int:
    """Check the options of a job over rows and run it. Returns the exit code."""
    need("openai" if options["url"] else "transformers", "batch")
    need("pyarrow", "batch")
    if options["dedup"] == "near":
        need("imagehash", "batch", or_else="take --dedup exact")
    model = build_config(ModelConfig, settings)
    if options["url"] is None:
        check_early(model)
        if not options["quiet"]:
            warn_of_limits(model.model)
    from serve.jobs.batch.job import BatchJob, Prompt, read_prompts, read_schema
    from serve.jobs.batch.rows import parse_columns
    from serve.jobs.batch.run import run_batch as run
    from serve.jobs.job import JobError

    prompt, prompts, schema = options.pop("prompt"), options.pop("prompts"), options.pop("schema")
    if prompts is not None and (prompt is not None or schema is not None):
        raise JobError("give --prompts, or --prompt and --schema; the file of --prompts may hold schemas itself")
    if prompt is not None and not prompt.strip():
        raise JobError("the prompt is empty; give a question, or none to ask for a description")
    asked = read_prompts(prompts) if prompts else (Prompt(text=prompt, schema=schema and read_schema(schema)),)
    columns, inputs = parse_columns(options.pop("columns")), options.pop("inputs")
    form = options.pop("form") or ("openai" if any(map(_is_batch, inputs)) else "jsonl")
    options["progress_json"] = options.pop("progress") == "json"
    return run(BatchJob(inputs=inputs, prompts=asked, columns=columns, form=form, model=model, name=name, **options))


def _is_batch(path: str) -> bool:
    """Whether a file begins as an OpenAI batch does."""
    if not path.endswith((".jsonl", ".ndjson")):
        return False
    try:
        with open(path, "rb") as lines:
            first = json.loads(next(iter(lines), b"{}"))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and "custom_id" in first and "body" in first
