"""`mm eval`: the share of right answers, by task and reducer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mm.config import ModelConfig
from mm.errors import InvalidOption
from serve.cli.checks import check_early, need
from serve.cli.options import build_config, read_reducer, setting_options


@click.command(name="eval")
@click.option("--model", help='"tiny" (the default), a folder, or a hub name; with --url the name served there.')
@click.option("--reducer", multiple=True, help="Reducer to use; repeat for one column each.")
@click.option("--task", multiple=True, help="Only this task; repeat for several.")
@click.option("--wording", help="Only items in this wording: trained or unseen.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only the first items of each task and wording, this many."
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Parquet file of your own; see the README for its columns."
)
@click.option("--control/--no-control", default=True, help="Ask everything once more about another item's picture.")
@click.option("--suffix", default="", help='Text after every question, such as "Answer in one word."')
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result to this file.")
@click.option("--answers", type=click.Path(path_type=Path), help="Write every answer to this file, one JSON line each.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--url", help="Ask an OpenAI-compatible server, such as http://host:8000/v1.")
@click.option("--api-key", envvar="MM_API_KEY", help="Key that the server asks for.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Requests to the server at a time."
)
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Frames sampled from a clip, evenly over its length; the shipped clips have up to 16.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=192, show_default=True, help="Longest answer.")
@setting_options(ModelConfig, only=("device", "dtype", "quantize", "threads"))
def evaluate(
    settings: dict[str, Any],
    model: str | None,
    reducer: tuple[str, ...],
    task: tuple[str, ...],
    answers: Path | None,
    frames: int,
    **options: Any,
) -> None:
    """Ask the held-out set and count the right answers, by task, wording, number of objects and reducer."""
    for package in ("pyarrow", "rich", "transformers"):
        need(package, "batch")
    _check_place(settings, options["url"])
    config = build_config(ModelConfig, settings, model=model or "tiny", frames=frames)
    if options["url"] is None:
        check_early(config)
    from serve.evaluation.command import Evaluation, run_evaluation

    job = Evaluation(
        reducers=tuple(map(read_reducer, reducer)),
        tasks=task,
        answers_file=answers,
        served_model=model,
        model=config,
        num_frames=frames,
        **options,
    )
    run_evaluation(job)


def _check_place(settings: dict[str, Any], url: str | None) -> None:
    """Refuse options of the other place: settings of a model that a server has loaded, or how to ask none.

    Raises:
        InvalidOption: Names the option.
    """
    if url is not None:
        for name in settings:
            raise InvalidOption("eval", name, "is a setting of the model behind --url; give it to that server")
    elif click.get_current_context().get_parameter_source("concurrency") is ParameterSource.COMMANDLINE:
        raise InvalidOption("eval", "concurrency", "needs --url; without it one question is asked at a time")
