"""What a run says about a candidate: percentiles, attainment, goodput, and the rate that its stages cannot exceed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve.planning.accounting import StageUse
from serve.planning.curves import Curves
from serve.planning.layout import Fleet, Layout
from serve.planning.policies import Policies
from serve.planning.simulate import Outcome, simulate
from serve.planning.targets import Targets
from serve.planning.traffic import Column, Traffic

ATTAINMENT = 0.9
"""Share of requests that have to meet the targets at the rate that is called goodput, as in the EPD paper."""
EXACT = 1.02
"""Over the goodput that is found, below which the true one lies."""
SLOWEST = 1 / 64
"""Of the rate that is asked for: what misses its targets there has no goodput."""


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of the requests that were answered; NaN where none was."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Column) -> Percentiles:
        found = values[~np.isnan(values)]
        points = np.percentile(found, [50, 90, 99]) if len(found) else [float("nan")] * 3
        return cls(p50=float(points[0]), p90=float(points[1]), p99=float(points[2]))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run of one candidate.

    Attributes:
        rate: Requests per second that arrived.
        throughput: Requests per second that were answered, until the last token.
        attainment: Share of all requests that met both targets; a refused one met none.
        refused: Share of all requests.
    """

    num_requests: int
    rate: float
    throughput: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    e2e_s: Percentiles
    attainment: float
    refused: float
    stages: tuple[StageUse, ...]

    @classmethod
    def of(cls, traffic: Traffic, outcome: Outcome, targets: Targets) -> Figures:
        several = traffic.output_tokens > 1
        return cls(
            num_requests=len(traffic),
            rate=traffic.rate,
            throughput=(len(traffic) - outcome.num_refused) / outcome.duration_s,
            ttft_s=Percentiles.of(outcome.ttft_s),
            tpot_s=Percentiles.of(outcome.tpot_s[several]),
            e2e_s=Percentiles.of(outcome.e2e_s),
            attainment=attainment(outcome, targets),
            refused=outcome.num_refused / len(traffic),
            stages=outcome.stages,
        )

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"stages": [asdict(one) | {"utilisation": one.utilisation} for one in self.stages]}


def attainment(outcome: Outcome, targets: Targets) -> float:
    """Share of all requests that met both targets."""
    return float(((outcome.ttft_s <= targets.ttft_s) & (outcome.tpot_s <= targets.tpot_s)).mean())


def goodput(is_met: Callable[[float], bool], offered: float, highest: float, exact: float = EXACT) -> float:
    """The highest rate that meets the targets.

    Args:
        is_met: Whether a rate does.
        offered: Where to look first.
        highest: No rate above it can.
        exact: The rate that is found may be so many times too low.

    Returns:
        Requests per second; 0 where even 1/64 of the offered rate misses.
    """
    low, high = 0.0, highest
    if offered < highest and is_met(offered):
        low = offered
    else:
        high = tried = min(offered, highest)
        while not low and tried > offered * SLOWEST:
            tried /= 2
            low, high = (tried, high) if is_met(tried) else (low, tried)
        if not low:
            return 0.0
    while high / low > exact:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low


Works = Mapping[str, tuple[float, float, float]]
"""GPU seconds that the mean request needs to encode, prefill and decode, by kind of GPU."""


def works_of(fleet: Fleet, traffic: Traffic) -> Works:
    """The least work of each stage: decoders decode in their cheapest batch, and chunks share every step."""
    curves = {kind: gpu.curves for kind, gpu in fleet.gpus.items()}
    return {
        kind: (_encode_work(one, traffic), _prefill_work(one, traffic), _decode_work(one, traffic))
        for kind, one in curves.items()
    }


def most_rate(layout: Layout, fleet: Fleet, traffic: Traffic, works: Works, policies: Policies) -> float:
    """Requests per second that no run of this layout can exceed for long, from the work of the mean request."""
    curves = {kind: gpu.curves for kind, gpu in fleet.gpus.items()}
    front = curves[(*layout.decode, *layout.prefill)[0]]
    base, per_picture, per_token = front.front_end
    mean = base + per_picture * float(traffic.pictures.mean()) + per_token * float(traffic.prompt_tokens.mean())
    bounds = [front.front_end_workers * policies.num_ingress / mean if mean else float("inf")]
    done = {
        "none": ((layout.decode, (0, 1, 2)),),
        "ep": ((layout.encode, (0,)), (layout.decode, (1, 2))),
        "pd": ((layout.prefill, (0, 1)), (layout.decode, (2,))),
        "epd": ((layout.encode, (0,)), (layout.prefill, (1,)), (layout.decode, (2,))),
    }[layout.split]
    for kinds, parts in done:
        work = {kind: sum(works[kind][part] for part in parts) for kind in set(kinds)}
        if kinds:
            bounds.append(sum(curves[kind].lanes / work[kind] if work[kind] else float("inf") for kind in kinds))
    return min(bounds)


def _encode_work(curves: Curves, traffic: Traffic) -> float:
    if curves.encode is None:
        return float("inf") if traffic.pictures.any() else 0.0
    some = traffic.pictures > 0
    pairs, counts = np.unique(np.stack([traffic.patches[some], traffic.pictures[some]]), axis=1, return_counts=True)
    grid = curves.encode
    total = sum(grid(patches / num, num) * count for (patches, num), count in zip(pairs.T, counts, strict=True))
    return float(total) / len(traffic)


def _prefill_work(curves: Curves, traffic: Traffic) -> float:
    if curves.prefill is None:
        return float("inf")
    longest, total = curves.engine.max_batch_tokens, 0.0
    lengths, counts = np.unique(traffic.prompt_tokens, return_counts=True)
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        for start in range(0, length, longest):
            total += count * max(0.0, curves.prefill(min(longest, length - start), start) - curves.step_s)
    return total / len(traffic)


def _decode_work(curves: Curves, traffic: Traffic) -> float:
    if curves.decode is None:
        return float("inf")
    tokens = np.maximum(0, traffic.output_tokens - 1)
    if not tokens.any():
        return 0.0
    contexts = traffic.prompt_tokens + tokens / 2
    context = float((contexts * tokens).sum() / tokens.sum())
    most = curves.engine.max_num_seqs
    batches: Sequence[int] = sorted({1, most, *(2**i for i in range(12) if 2**i < most)})
    return min(curves.decode(batch, context) / batch for batch in batches) * float(tokens.mean())


def unloaded(layout: Layout, fleet: Fleet, traffic: Traffic, policies: Policies) -> Outcome:
    """Some of the requests, one at a time, at an empty server."""
    step = max(1, len(traffic) // 200)
    columns = {name: getattr(traffic, name)[::step] for name in COLUMNS_OF_SIZE}
    alone = Traffic(arrival_s=np.arange(len(columns["pictures"]), dtype=np.float64) * 1e5, **columns)
    return simulate(layout, fleet, alone, policies)


COLUMNS_OF_SIZE = ("prompt_tokens", "pictures", "patches", "visual_tokens", "output_tokens")
