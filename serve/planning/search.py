"""Climbing from one division of the GPUs to a better one, where there are too many to look at them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from serve.planning.layout import Layout

STAGES = ("encode", "prefill", "decode")


def climb(start: Layout, neighbours: Callable[[Layout], Iterable[Layout]], worth: Callable[[Layout], float]) -> Layout:
    """The best layout that is reached by going to the best neighbour as long as it is better."""
    best, value = start, worth(start)
    while True:
        better = max(((worth(one), i, one) for i, one in enumerate(neighbours(best))), default=None)
        if better is None or better[0] <= value:
            return best
        value, _, best = better


def moved(layout: Layout) -> Iterator[Layout]:
    """Every layout with 1, 2, 4, ... GPUs of one kind given to another stage. No stage that has GPUs is emptied."""
    for source in STAGES:
        for target in STAGES:
            if source == target or not getattr(layout, source) or not getattr(layout, target):
                continue
            given: tuple[str, ...] = getattr(layout, source)
            for kind in dict.fromkeys(given):
                num = 1
                while num <= given.count(kind) and num < len(given):
                    rest = list(given)
                    for _ in range(num):
                        rest.remove(kind)
                    taken = (*getattr(layout, target), *(kind,) * num)
                    yield replace(layout, **{source: tuple(sorted(rest)), target: tuple(sorted(taken))})
                    num *= 2
