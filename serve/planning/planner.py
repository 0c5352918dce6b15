"""Compares the divisions of a fleet by simulation: first on a part of the traffic, the best ones on all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from serve.planning.curves import PlanError
from serve.planning.figures import ATTAINMENT, EXACT, Figures, goodput, most_rate, unloaded, works_of
from serve.planning.layout import SPLITS, Fleet, Layout, Split, can_run, colocated, layouts
from serve.planning.policies import Policies
from serve.planning.search import climb, moved
from serve.planning.simulate import meets, simulate
from serve.planning.targets import Targets
from serve.planning.traffic import Traffic

MOST_EXHAUSTIVE = 16
"""GPUs up to which every division is looked at."""
NUM_FINALISTS = 2
"""Candidates beside the colocated one that are run on all requests."""
SLACK = 5.0
"""Targets that nobody states: so many times what a request takes at an empty colocated server."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is made for.

    Attributes:
        targets: None takes `SLACK` times what a request takes alone.
        splits: Kinds of layouts that are compared.
        sample: Requests of the part on which all candidates are compared.
    """

    fleet: Fleet
    traffic: Traffic
    policies: Policies = field(default_factory=Policies)
    targets: Targets | None = None
    splits: tuple[Split, ...] = ("none", "ep", "epd")
    sample: int = 2000

    def __post_init__(self) -> None:
        if unknown := next((split for split in self.splits if split not in SPLITS), None):
            raise PlanError(f"split {unknown!r} is unknown; allowed: {', '.join(SPLITS)}")
        if "none" not in self.splits:
            raise PlanError("splits need `none`: the colocated plan is what the others are compared with")
        if self.sample < 100:
            raise PlanError(f"sample is {self.sample}; it has to be at least 100 requests")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout and what was found about it.

    Attributes:
        price: Of its GPUs per hour; None without prices.
        most_rate: Requests per second that its stages cannot exceed.
        figures: At the rate that is asked for, times the share of the fleet's GPUs that it has.
        at_equal_cost: At that rate times the share of the fleet's price; the same run where all GPUs are of one kind.
        goodput: Requests per second at 90 % attainment; None where `most_rate` shows that others are better.
        whole: At the rate that is asked for, on all requests; None for those that were run on a part.
    """

    layout: Layout
    num_gpus: int
    price: float | None
    most_rate: float
    figures: Figures
    at_equal_cost: Figures | None
    goodput: float | None
    whole: Figures | None = None

    @property
    def is_overloaded(self) -> bool:
        return self.figures.rate > self.most_rate

    def cost_per_1000(self, rate: float | None) -> float | None:
        """What 1,000 requests cost at a rate."""
        return None if self.price is None or not rate else self.price / 3600 / rate * 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
        candidates: The colocated one first, the others best first.
        targets_stated: Whether they were given.
        sampled: Requests on which all candidates were compared.
        is_exhaustive: Whether every division was looked at.
        notes: What was assumed, or has to be known to read the figures.
    """

    question: Question
    targets: Targets
    targets_stated: bool
    candidates: tuple[Candidate, ...]
    sampled: int
    is_exhaustive: bool
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        return max(self.candidates, key=self.worth)

    def worth(self, one: Candidate) -> float:
        """Goodput for the price of the fleet; without prices for its number of GPUs."""
        return (one.goodput or 0.0) * self.scale(one, at_cost=one.price is not None)

    def scale(self, one: Candidate, *, at_cost: bool) -> float:
        """By how much a candidate may be larger, to have as many GPUs as the fleet, or to cost as much."""
        fleet = self.question.fleet
        if not at_cost:
            return fleet.num_gpus / one.num_gpus
        whole = fleet.price_of([kind for kind, count in fleet.counts.items() for _ in range(count)])
        return whole / one.price if whole and one.price else 1.0


NOT_BEST = 1.1
"""How exactly the goodput of a candidate is looked for that others exceed."""

Progress = Callable[[str], None]


def make_plan(question: Question, on_progress: Progress = lambda _: None) -> Plan:
    """Compare the candidates.

    Raises:
        PlanError: There is no colocated plan, or a number cannot be used.
    """
    return _Planner(question, on_progress).plan()


class _Planner:
    def __init__(self, question: Question, on_progress: Progress) -> None:
        self._question, self._say = question, on_progress
        self._fleet, self._policies = question.fleet, question.policies
        self._traffic = question.traffic
        self._has_pictures = bool(self._traffic.pictures.any())
        self._base = colocated(self._fleet)
        self._sample = busiest(self._traffic, question.sample)
        self._works = works_of(self._fleet, self._sample)
        self._targets = question.targets or self._lenient()
        self._found: dict[Layout, Candidate] = {}
        self._best = 0.0

    def plan(self) -> Plan:
        is_exhaustive = self._fleet.num_gpus <= MOST_EXHAUSTIVE
        self._look(self._base)
        if is_exhaustive:
            every = [one for one in self._layouts() if one != self._base]
            every.sort(key=self._most_rate, reverse=True)
            for i, layout in enumerate(every):
                self._say(f"{i + 1} of {len(every)} candidates: {layout.name}")
                self._look(layout)
        else:
            self._search()
        plan = self._plan(list(self._found.values()), is_exhaustive)
        if len(self._sample) == len(self._traffic):
            return plan
        finalists = [plan.candidates[0], *plan.candidates[1 : 1 + NUM_FINALISTS]]
        whole = {one.layout: self._on_all(one) for one in finalists}
        return replace(plan, candidates=tuple(replace(c, whole=whole.get(c.layout)) for c in plan.candidates))

    def _on_all(self, one: Candidate) -> Figures:
        self._say(f"all {len(self._traffic)} requests: {one.layout.name}")
        traffic = self._traffic.at_rate(self._traffic.rate * one.num_gpus / self._fleet.num_gpus)
        return self._run(one.layout, traffic)

    def _layouts(self) -> Iterator[Layout]:
        every = layouts(self._fleet, self._question.splits, needs_encoder=self._has_pictures)
        return (one for one in every if can_run(one, self._fleet, needs_encoder=self._has_pictures))

    def _search(self) -> None:
        """Of each split, climb from the division whose stages could do most."""
        for split in self._question.splits:
            starts = [] if split in ("none", "pd") else self._starts(split)
            for start in starts:
                by_bound = climb(start, self._neighbours, self._most_rate)
                climb(by_bound, self._neighbours, lambda layout: self._look(layout).goodput or 0.0)

    def _starts(self, split: Split) -> list[Layout]:
        kinds = [kind for kind, count in self._fleet.counts.items() for _ in range(count)]
        kinds.sort(key=lambda kind: self._fleet.gpus[kind].curves.decodes)  # those that only encode come first
        third = max(1, len(kinds) // 3)
        if split == "ep" and self._has_pictures:
            start = Layout(split="ep", encode=_sorted(kinds[:third]), decode=_sorted(kinds[third:]))
        elif split == "epd":
            cut = third if self._has_pictures else 0
            parts = kinds[:cut], kinds[cut : cut + third], kinds[cut + third :]
            start = Layout(split="epd", encode=_sorted(parts[0]), prefill=_sorted(parts[1]), decode=_sorted(parts[2]))
        else:
            return []
        return [start] if can_run(start, self._fleet, needs_encoder=self._has_pictures) else []

    def _neighbours(self, layout: Layout) -> Iterator[Layout]:
        return (one for one in moved(layout) if can_run(one, self._fleet, needs_encoder=self._has_pictures))

    def _most_rate(self, layout: Layout) -> float:
        sample = self._sample
        return most_rate(layout, self._fleet, sample, self._works, self._policies)

    def _run(self, layout: Layout, traffic: Traffic) -> Figures:
        return Figures.of(traffic, simulate(layout, self._fleet, traffic, self._policies), self._targets)

    def _look(self, layout: Layout) -> Candidate:
        """Simulate a candidate on the sample, unless that has been done."""
        if layout in self._found:
            return self._found[layout]
        rate, most = self._sample.rate, self._most_rate(layout)
        share = len(layout.gpus) / self._fleet.num_gpus
        figures = self._run(layout, self._sample.at_rate(rate * share))
        price, whole = self._fleet.price_of(layout.gpus), self._fleet.price_of(self._all_kinds())
        at_cost = None
        if price is not None and whole:
            same = abs(price / whole - share) < 1e-9
            at_cost = figures if same else self._run(layout, self._sample.at_rate(rate * price / whole))
        found = None
        if most / ATTAINMENT >= self._best or layout == self._base:
            found = self._goodput(layout, figures, most / ATTAINMENT)
            self._best = max(self._best, found)
        candidate = Candidate(
            layout=layout,
            num_gpus=len(layout.gpus),
            price=price,
            most_rate=most,
            figures=figures,
            at_equal_cost=at_cost,
            goodput=found,
        )
        self._found[layout] = candidate
        return candidate

    def _goodput(self, layout: Layout, figures: Figures, highest: float) -> float:
        """To 2 %, and to 10 % for one that is no better than the best so far."""
        known = {figures.rate: figures.attainment >= ATTAINMENT}

        def is_met(rate: float) -> bool:
            if rate not in known:
                sample = self._sample.at_rate(rate)
                known[rate] = meets(layout, self._fleet, sample, self._policies, self._targets, ATTAINMENT)
            return known[rate]

        start = min(self._best, highest) or figures.rate
        is_worse = bool(self._best) and not is_met(start)
        return goodput(is_met, start, highest, NOT_BEST if is_worse else EXACT)

    def _all_kinds(self) -> list[str]:
        return [kind for kind, count in self._fleet.counts.items() for _ in range(count)]

    def _lenient(self) -> Targets:
        alone = unloaded(self._base, self._fleet, self._traffic, self._policies)
        if alone.num_refused == len(alone.ttft_s):
            raise PlanError("no request fits the decoder's KV cache (engine.kv_tokens of the curves)")
        several = alone.tpot_s[alone.tpot_s > 0]
        tpot = float(np.nanpercentile(several, 90)) if len(several) else 1.0
        return Targets(ttft_s=SLACK * float(np.nanpercentile(alone.ttft_s, 90)), tpot_s=SLACK * tpot)

    def _plan(self, found: list[Candidate], is_exhaustive: bool) -> Plan:
        plan = Plan(
            question=self._question,
            targets=self._targets,
            targets_stated=self._question.targets is not None,
            candidates=tuple(found),
            sampled=len(self._sample),
            is_exhaustive=is_exhaustive,
            notes=tuple(self._notes()),
        )
        rest = [one for one in found if one.layout != self._base]
        rest.sort(key=lambda one: (plan.worth(one), one.most_rate), reverse=True)
        return replace(plan, candidates=(self._found[self._base], *rest))

    def _notes(self) -> Iterator[str]:
        yield from self._traffic.notes
        if len(self._sample) < len(self._traffic):
            yield (
                f"candidates are compared on the {len(self._sample)} requests in a row that bring most work per second "
                f"({self._sample.rate:.3g} requests/s; all of them {self._traffic.rate:.3g})"
            )
        some = self._traffic.pictures > 0
        most = self._traffic
        for kind, gpu in self._fleet.gpus.items():
            patches = int((most.patches[some] / most.pictures[some]).max()) if some.any() else 0
            context = int((most.prompt_tokens + most.output_tokens).max())
            for far in gpu.curves.beyond(patches, int(most.pictures.max()), int(most.prompt_tokens.max()), context):
                yield f"{kind}: {far}; beyond it the curve is continued in a straight line"
            if gpu.curves.decodes and not [name for name in gpu.curves.hand_off if name != "process"]:
                yield f"{kind}: no hand-off between GPUs was measured, so it takes no time here"


def busiest(traffic: Traffic, num: int) -> Traffic:
    """The `num` requests in a row that bring the most work per second, by tokens and patches."""
    if len(traffic) <= num:
        return traffic
    parts: Sequence[Any] = (traffic.prompt_tokens, traffic.patches, traffic.output_tokens * 8)
    load = np.concatenate([[0.0], np.cumsum(sum(part / max(1.0, float(part.mean())) for part in parts))])
    starts = np.arange(0, len(traffic) - num + 1, max(1, num // 8))
    span = traffic.arrival_s[starts + num - 1] - traffic.arrival_s[starts]
    work = load[starts + num] - load[starts]
    start = int(starts[np.argmax(work / np.maximum(span, 1e-9))])
    return traffic.part(start, start + num)


def _sorted(kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(kinds))
