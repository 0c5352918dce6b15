"""`mm plan`: how many GPUs should encode, prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from serve.cli.checks import need

MADE = ("images", "prompt_tokens", "output_tokens", "num_requests", "burstiness", "seed")
"""Options of the requests that are made where no trace is given."""
OF_PICTURES = ("patches", "tokens_per_image", "keep_ratio", "sharding", "encode_workers")
APART = ("sharding", "transport")
"""Options of layouts whose stages are apart."""


@click.command()
@click.option(
    "--gpus", multiple=True, required=True, help="GPUs to divide: 8, or KIND=COUNT; repeat for several kinds."
)
@click.option(
    "--curves",
    multiple=True,
    required=True,
    help="File of `mm bench calibrate`, or KIND=FILE; repeat for several kinds.",
)
@click.option("--price", "prices", multiple=True, help="Price of a GPU per hour, or KIND=PRICE; repeat.")
@click.option("--rate", type=float, help="Requests per second; with --trace it replaces the trace's own rate.")
@click.option("--trace", type=click.Path(path_type=Path), help="CSV of requests, recorded or in the Azure LMM form.")
@click.option("--limit", type=click.IntRange(min=2), help="Take only the first requests of the trace.")
@click.option("--images", default=1, show_default=True, help="Pictures per request, without a trace.")
@click.option("--prompt-tokens", default=32, show_default=True, help="Text tokens per request, without a trace.")
@click.option("--output-tokens", default=64, show_default=True, help="Tokens of an answer, without a trace.")
@click.option(
    "--requests", "num_requests", default=2000, show_default=True, help="Number of requests, without a trace."
)
@click.option(
    "--burstiness",
    default=1.0,
    show_default=True,
    help="Shape of the gaps' gamma distribution, without a trace: 1 is Poisson, less comes in bursts.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random arrivals.")
@click.option("--patches", type=click.IntRange(min=1), help="Patches of a picture; else what the curves say.")
@click.option("--tokens-per-image", type=click.IntRange(min=1), help="Visual tokens of a picture, likewise.")
@click.option("--keep-ratio", default=1.0, show_default=True, help="Share of the visual tokens that a reducer leaves.")
@click.option("--ttft", "ttft_s", type=float, help="Target: seconds to the first token.")
@click.option("--tpot", "tpot_s", type=float, help="Target: seconds per token after it.")
@click.option(
    "--split", "splits", multiple=True, default=("none", "ep", "epd"), show_default=True, help="Layouts; repeat."
)
@click.option("--sharding", is_flag=True, help="Share the pictures of a request out among encoders.")
@click.option("--encode-workers", type=click.IntRange(min=1), default=2, show_default=True, help="Of each encoder.")
@click.option("--ingresses", type=click.IntRange(min=1), default=1, show_default=True, help="HTTP replicas.")
@click.option("--transport", help="Between GPUs, as the curves name it; else the first that they have.")
@click.option("--sample", default=2000, show_default=True, help="Requests on which all candidates are compared.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all candidates to this file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the settings of the best, for `mm serve --config`.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def plan(
    images: int,
    prompt_tokens: int,
    output_tokens: int,
    keep_ratio: float,
    patches: int | None,
    tokens_per_image: int | None,
    **options: Any,
) -> None:
    """Simulate every way to divide GPUs among encode, prefill and decode, the colocated one first.

    The curves say how long each stage takes; `mm bench calibrate` measures them. Goodput is the highest rate at which
    90 % of the requests meet both targets.
    """
    need("blake3", "models")
    _refuse_what_changes_nothing(images, options["trace"], options["splits"], keeps_out=options["out"] is not None)
    from serve.planning.command import PlanJob, run_plan
    from serve.planning.curves import Picture, PlanError
    from serve.planning.policies import Policies
    from serve.planning.traffic import Shape

    if (patches is None) != (tokens_per_image is None):
        raise PlanError("give both --patches and --tokens-per-image, or none")
    picture = None if patches is None or tokens_per_image is None else Picture(patches=patches, tokens=tokens_per_image)
    policies = Policies(
        sharding=options.pop("sharding"),
        encode_workers=options.pop("encode_workers"),
        num_ingress=options.pop("ingresses"),
        transport=options.pop("transport"),
    )
    shape = Shape(pictures=images, text_tokens=prompt_tokens, output_tokens=output_tokens, keep_ratio=keep_ratio)
    run_plan(PlanJob(shape=shape, picture=picture, policies=policies, **options))


def _refuse_what_changes_nothing(images: int, trace: Path | None, splits: tuple[str, ...], *, keeps_out: bool) -> None:
    """Refuse options that are given and would not change the plan, or that its settings could not keep.

    Raises:
        PlanError: Names the option, and the one that makes it idle.
    """
    from serve.planning.curves import PlanError

    context = click.get_current_context()
    flags = {one.name: one.opts[-1] for one in context.command.params}
    given = [name for name in flags if name and context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    idle = dict[str, str]()
    if trace is None:
        idle["limit"] = "takes the first requests of a trace, and there is no --trace"
    else:
        idle |= dict.fromkeys(MADE, "is about made requests, and --trace brings its own")
    if trace is None and images == 0:
        idle |= dict.fromkeys(OF_PICTURES, "is about pictures, and --images 0 leaves none")
    if trace is None and images == 1:
        idle["sharding"] = "shares the pictures of a request out, and each has one: give --images 2 or more"
    if set(splits) == {"none"}:
        idle |= dict.fromkeys(APART, "is about stages that are apart, and --split none has none")
    if keeps_out:
        idle["sharding"] = "cannot be kept in --out: `mm serve` does not share the pictures of a request out"
    if wrong := next((name for name in given if name in idle), None):
        raise PlanError(f"{flags[wrong]} {idle[wrong]}; leave one of them out")
