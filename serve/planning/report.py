"""A plan as a table for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve.planning.figures import ATTAINMENT, Figures
from serve.planning.planner import Candidate, Plan

NUM_ROWS = 12
HEADER = (
    f"{'':<22}{'TTFT p50':>9}{'p90':>9}{'p99':>9}{'TPOT p50':>10}{'p90':>9}{'p99':>9}{'in time':>9}{'goodput':>9}"
    f"{'at cost':>9}{'per 1000':>10}"
)


def text(plan: Plan) -> str:
    """What `mm plan` prints."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    traffic, targets, base = plan.question.traffic, plan.targets, plan.candidates[0]
    stated = "" if plan.targets_stated else ", not stated: 5 times what a request takes at an empty colocated server"
    yield (
        f"{len(traffic)} requests at {traffic.rate:.3g}/s, {float(traffic.pictures.mean()):.3g} pictures, "
        f"{float(traffic.prompt_tokens.mean()):.0f} prompt tokens and {float(traffic.output_tokens.mean()):.0f} output "
        "tokens each, on the mean"
    )
    yield f"targets: TTFT {_seconds(targets.ttft_s)}, TPOT {_seconds(targets.tpot_s)}{stated}"
    yield ""
    yield HEADER
    shown = plan.candidates[:NUM_ROWS]
    for one in shown:
        yield _row(plan, one)
        if one.is_overloaded:
            yield f"{'':<4}overloaded: its stages cannot do more than {one.most_rate:.3g} requests/s, and latency grows"
    if len(plan.candidates) > len(shown):
        yield f"{len(plan.candidates) - len(shown)} more candidates are in the file of --json"
    yield ""
    yield from _about_columns(plan)
    if any(one.whole for one in plan.candidates):
        yield ""
        yield f"on all {len(traffic)} requests:"
        yield from (_whole_row(one, one.whole) for one in plan.candidates if one.whole)
    yield from (f"note: {note}" for note in plan.notes)
    yield _verdict(plan, base)


def _row(plan: Plan, one: Candidate) -> str:
    found, cost = one.figures, one.cost_per_1000(one.goodput)
    good = "less" if one.goodput is None else f"{one.goodput:.3g}/s"
    scaled = "" if one.goodput is None else f"{one.goodput * plan.scale(one, at_cost=True):.3g}/s"
    at_cost = scaled if one.price is not None else "-"
    return (
        f"{one.layout.name:<22}{_percentiles(found)}{found.attainment:>9.1%}{good:>9}{at_cost:>9}"
        f"{'-' if cost is None else f'{cost:.3g}':>10}"
    )


def _whole_row(one: Candidate, found: Figures) -> str:
    refused = f", {found.refused:.1%} refused" if found.refused else ""
    return f"{one.layout.name:<22}{_percentiles(found)}{found.attainment:>9.1%}{refused}"


def _percentiles(found: Figures) -> str:
    ttft, tpot = found.ttft_s, found.tpot_s
    cells = [_seconds(ttft.p50), _seconds(ttft.p90), _seconds(ttft.p99)]
    later = [_seconds(tpot.p50), _seconds(tpot.p90), _seconds(tpot.p99)]
    return f"{cells[0]:>9}{cells[1]:>9}{cells[2]:>9}{later[0]:>10}{later[1]:>9}{later[2]:>9}"


def _about_columns(plan: Plan) -> Iterator[str]:
    yield (
        "in time: requests that met both targets at the rate asked for. goodput: the highest rate at which "
        f"{ATTAINMENT:.0%} do;"
    )
    yield (
        '"less" where the stages alone show that it is less than another\'s. at cost: goodput for the price of the '
        "whole fleet."
    )
    if any(one.num_gpus != plan.question.fleet.num_gpus for one in plan.candidates):
        yield "a layout that has a part of the fleet's GPUs gets that part of the rate."
    if not plan.is_exhaustive:
        yield f"{len(plan.candidates)} divisions were looked at by climbing, not all."


def _verdict(plan: Plan, base: Candidate) -> str:
    best = plan.best
    if not (best.goodput or 0):
        return "no candidate meets the targets, not even at a small part of the rate; state others, or use other GPUs"
    if best.layout == base.layout:
        return f"best: {base.layout.name}. Splitting does not pay for this traffic."
    what = "for the same price" if best.price is not None else "with the same number of GPUs"
    if not base.goodput:
        return f"best: {best.layout.name}; the colocated plan does not meet the targets at any rate"
    return f"best: {best.layout.name}, {plan.worth(best) / plan.worth(base):.2f}x the colocated goodput {what}"


def _seconds(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def plain(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON has it. Seconds, requests per second, and the currency of the prices."""
    traffic, fleet = plan.question.traffic, plan.question.fleet
    return {
        "schema": 1,
        "gpus": dict(fleet.counts),
        "prices_per_hour": {name: gpu.price for name, gpu in fleet.gpus.items()},
        "traffic": {
            "requests": len(traffic),
            "rate": traffic.rate,
            "pictures": float(traffic.pictures.mean()),
            "prompt_tokens": float(traffic.prompt_tokens.mean()),
            "output_tokens": float(traffic.output_tokens.mean()),
        },
        "targets": {"ttft_s": plan.targets.ttft_s, "tpot_s": plan.targets.tpot_s, "stated": plan.targets_stated},
        "attainment": ATTAINMENT,
        "sampled_requests": plan.sampled,
        "is_exhaustive": plan.is_exhaustive,
        "notes": list(plan.notes),
        "best": plan.best.layout.name,
        "candidates": [_plain(plan, one) for one in plan.candidates],
    }


def _plain(plan: Plan, one: Candidate) -> dict[str, Any]:
    layout, cost = one.layout, plan.scale(one, at_cost=True)
    return {
        "name": layout.name,
        "split": layout.split,
        "encode": list(layout.encode),
        "prefill": list(layout.prefill),
        "decode": list(layout.decode),
        "price_per_hour": one.price,
        "rate_at_most": _finite(one.most_rate),
        "is_overloaded": one.is_overloaded,
        "goodput": one.goodput,
        "goodput_at_equal_gpus": None if one.goodput is None else one.goodput * plan.scale(one, at_cost=False),
        "goodput_at_equal_cost": None if one.goodput is None or one.price is None else one.goodput * cost,
        "cost_per_1000_at_goodput": one.cost_per_1000(one.goodput),
        "cost_per_1000_at_rate": one.cost_per_1000(one.figures.rate),
        "at_equal_gpus": _without_nan(one.figures.plain()),
        "at_equal_cost": None if one.at_equal_cost is None else _without_nan(one.at_equal_cost.plain()),
        "all_requests": None if one.whole is None else _without_nan(one.whole.plain()),
    }


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") and value == value else None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; a percentile of nothing is null."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return _finite(value) if isinstance(value, float) else value
