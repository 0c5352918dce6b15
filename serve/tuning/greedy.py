"""The greedy search: layer by layer from below, the fewest visual tokens with which the answers do not get worse.

arXiv:2412.00556, "G-Search": tokens rank alike in all layers, so a layer never needs more of them than the one below,
and answers do not get better with fewer. So what a layer needs is found by halving, with the same number in all layers
above, and the next layer starts from there.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.tuning.schedule import Schedule

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
"""Shares that are tried, falling."""


def greedy(num_layers: int, is_good: Callable[[Schedule], bool]) -> Schedule:
    """The schedule, of shares in `RATIOS`.

    Args:
        is_good: Whether a schedule answers as well as it has to. Everything kept is taken to be good.
    """
    schedule, at = [1.0], 0
    for layer in range(1, num_layers):
        low, high = at, len(RATIOS) - 1  # RATIOS[low] is known to be good from this layer on
        while low < high:
            middle = (low + high + 1) // 2
            if is_good((*schedule, *[RATIOS[middle]] * (num_layers - layer))):
                low = middle
            else:
                high = middle - 1
        at = low
        schedule.append(RATIOS[at])
    return tuple(schedule)


def most_trials(num_layers: int) -> int:
    """More schedules than this are never tried."""
    return (num_layers - 1) * len(RATIOS).bit_length()
