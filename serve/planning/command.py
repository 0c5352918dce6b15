"""`mm plan`, once its options are read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve.planning.curves import Curves, Picture, PlanError, read_curves
from serve.planning.layout import Fleet, Gpu, Split
from serve.planning.page import page
from serve.planning.planner import Candidate, Plan, Question, make_plan
from serve.planning.policies import Policies
from serve.planning.report import plain, text
from serve.planning.server_settings import ANY_GPU, as_yaml, settings_for
from serve.planning.targets import Targets
from serve.planning.traces import read_trace
from serve.planning.traffic import Shape, Traffic, kept, random_traffic


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """One run of `mm plan`.

    Attributes:
        gpus: Such as ("8",), or ("H100=4", "L4=8").
        curves, prices: A file or number for all kinds, or KIND=FILE and KIND=NUMBER.
        rate: Of a random process; of a trace it replaces the trace's own.
        picture: Of pictures whose size the trace does not say; None takes the curves' own.
        ttft_s, tpot_s: Targets; both or none.
        json_file, out, html: What is written beside the table.
    """

    gpus: tuple[str, ...]
    curves: tuple[str, ...]
    prices: tuple[str, ...] = ()
    trace: Path | None = None
    rate: float | None = None
    shape: Shape = field(default_factory=Shape)
    num_requests: int = 2000
    burstiness: float = 1.0
    seed: int = 0
    limit: int | None = None
    picture: Picture | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    splits: tuple[Split, ...] = ("none", "ep", "epd")
    sample: int = 2000
    policies: Policies = field(default_factory=Policies)
    json_file: Path | None = None
    out: Path | None = None
    html: Path | None = None
    quiet: bool = False


def run_plan(job: PlanJob) -> None:
    """Plan, print the table and write the files.

    Raises:
        PlanError: Names what was given and what to do.
    """
    started = time.monotonic()
    for path in filter(None, (job.json_file, job.html, job.out)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise PlanError(f"{path} cannot be written: give the name of a file in a folder that is there")
    plan = make_plan(question(job), _silent if job.quiet else _say)
    if not job.quiet:
        sys.stderr.write("\r\033[K")
    sys.stdout.write(f"{text(plan)}\n")
    if job.json_file is not None:
        _write(job.json_file, json.dumps(plain(plan), indent=1) + "\n")
    if job.html is not None:
        _write(job.html, page(plan))
    if job.out is not None:
        _write_settings(job, plan)
    sys.stderr.write(f"mm: planned in {time.monotonic() - started:.1f} s\n")


def question(job: PlanJob) -> Question:
    """What is asked.

    Raises:
        PlanError: As `run_plan`.
    """
    fleet = fleet_of(job.gpus, job.curves, job.prices)
    if (job.ttft_s is None) != (job.tpot_s is None):
        raise PlanError("give both targets, --ttft and --tpot, or none")
    targets = None if job.ttft_s is None or job.tpot_s is None else Targets(ttft_s=job.ttft_s, tpot_s=job.tpot_s)
    return Question(
        fleet=fleet,
        traffic=_traffic(job, fleet),
        policies=job.policies,
        targets=targets,
        splits=job.splits,
        sample=job.sample,
    )


def _traffic(job: PlanJob, fleet: Fleet) -> Traffic:
    pictures = (gpu.curves.picture for gpu in fleet.gpus.values())
    picture = job.picture or next(filter(None, pictures), None)
    if job.trace is not None:
        traffic = kept(read_trace(job.trace, picture, job.limit), job.shape.keep_ratio)
        if job.picture is not None and traffic.has_sizes:
            what = f"and {job.trace} says how large each one is; leave them out"
            raise PlanError(f"--patches and --tokens-per-image are for pictures of unknown size, {what}")
        if job.rate is None:
            return traffic
        if not job.rate > 0:
            raise PlanError(f"rate is {job.rate:g}; it has to be above 0 requests per second")
        return traffic.at_rate(job.rate)
    if job.rate is None:
        raise PlanError("say what traffic to plan for: --rate, or --trace FILE")
    return random_traffic(
        job.shape,
        picture,
        rate=job.rate,
        num_requests=job.num_requests,
        burstiness=job.burstiness,
        seed=job.seed,
    )


def fleet_of(gpus: Sequence[str], curves: Sequence[str], prices: Sequence[str]) -> Fleet:
    """The fleet that options describe.

    Raises:
        PlanError: A kind has no curves, or something cannot be read.
    """
    counts = {kind: _count(text) for kind, text in _by_kind(gpus, "--gpus", [ANY_GPU]).items()}
    if not counts:
        raise PlanError("no GPUs were given; say --gpus 8, or --gpus H100=4 --gpus L4=8")
    kinds = list(counts)
    files, price = _by_kind(curves, "--curves", kinds), _by_kind(prices, "--price", kinds)
    for option, given in (("--curves", files), ("--price", price)):
        if unknown := next((kind for kind in given if kind not in counts), None):
            raise PlanError(f"{option} names GPUs of kind {unknown!r}, and --gpus has {', '.join(kinds)}")
    if missing := [kind for kind in kinds if kind not in files]:
        raise PlanError(f"no curves for {', '.join(missing)}; give --curves FILE, or --curves {missing[0]}=FILE")
    if price and (missing := [kind for kind in kinds if kind not in price]):
        raise PlanError(f"no price for {', '.join(missing)}; give the price of each kind, or none")
    read: dict[str, Curves] = {file: read_curves(Path(file)) for file in dict.fromkeys(files.values())}
    made = {
        kind: Gpu(name=kind, curves=read[files[kind]], price=_price(price[kind]) if price else None) for kind in kinds
    }
    return Fleet(gpus=made, counts=counts)


def _by_kind(given: Sequence[str], option: str, kinds: Sequence[str]) -> dict[str, str]:
    """KIND=VALUE by kind; a value without a kind is every kind's."""
    found: dict[str, str] = {}
    for one in given:
        kind, equals, value = one.partition("=")
        for name in [kind] if equals else kinds:
            if name in found:
                raise PlanError(f"{option} is given twice for GPUs of kind {name}")
            found[name] = value if equals else one
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise PlanError(f"--gpus has {text!r}; give a whole number above 0, such as 8 or H100=8")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 < price < float("inf"):
        raise PlanError(f"--price has {text!r}; give a number above 0, per GPU and hour")
    return price


def _write_settings(job: PlanJob, plan: Plan) -> None:
    """Settings of the best candidate that `mm serve` can run."""
    assert job.out is not None
    order = sorted(plan.candidates, key=plan.worth, reverse=True)
    reasons = list[str]()
    for one in order:
        try:
            settings = settings_for(one.layout, plan.question.fleet, job.policies, job.shape.keep_ratio)
        except PlanError as error:
            reasons.append(str(error))
            continue
        if reasons:
            sys.stderr.write(f"mm: {reasons[0]}; {job.out} has the best that it can run, {one.layout.name}\n")
        _write(job.out, as_yaml(settings, _comment(one)))
        return
    raise PlanError(f"no candidate can be written to {job.out}: {reasons[0]}")


def _comment(one: Candidate) -> str:
    good = "" if one.goodput is None else f", planned for up to {one.goodput:.3g} requests/s"
    return f"{one.layout.name}{good}; made by `mm plan`. Start it with: mm serve --config FILE"


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror or error}") from None


def _say(what: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[Kmm: {what}")
        sys.stderr.flush()


def _silent(_: str) -> None:
    pass
