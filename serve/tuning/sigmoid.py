"""The sigmoid search: under a budget of FLOPs, the falling sigmoid over depth that answers best.

arXiv:2412.00556, "P-Sigmoid": shares fall along a sigmoid over the layers, and Bayesian optimisation chooses its
parameters. Here these are how steeply it falls and what is left at the end; where it falls follows from them, so that
every curve that is tried uses the budget up. Schedules that need no search are tried first: all that goes goes at layer
1 or 2 (FastV), or the share falls by one factor from layer to layer (PyramidDrop). A Gaussian process over the shares
models the score, and the next curve is the one with the largest expected improvement. What is taken in the end is the
best by the model's mean, which a few lucky answers do not move. Equal scores give equal searches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm, qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from mm.errors import InvalidOption
from serve.tuning.schedule import STEP, Schedule, Shape, written

STEEPNESS = (2.0, 200.0)
"""Slope of the sigmoid over the relative depth, from nearly straight to a step; searched on a logarithmic scale."""

NUM_FIRST = 5
"""Curves that are tried before there is anything to learn from."""

NUM_CANDIDATES = 512
"""Curves among which the next one is chosen, a power of two."""


def largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number between these two that fits, where with each all smaller ones do; `low` if none does."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def curve(shape: Shape, steepness: float, last: float, middle: float) -> Schedule:
    """The shares along the sigmoid that falls to `last` around the relative depth `middle`."""
    depths = [layer / shape.num_layers for layer in range(1, shape.num_layers)]
    falling = [0.5 - 0.5 * math.tanh(steepness * (depth - middle) / 2) for depth in depths]
    return 1.0, *(written(last + (1 - last) * share) for share in falling)


def fitted(shape: Shape, budget: float, steepness: float, last: float) -> Schedule:
    """The curve of this slope and end that costs as much as `budget`, a share of all FLOPs, and no more."""
    reach = 1 + 20 / steepness

    def fits(middle: float) -> bool:
        return shape.flop_share(curve(shape, steepness, last, middle)) <= budget

    return curve(shape, steepness, last, largest(fits, -reach, 1 + reach))


def largest_last(shape: Shape, budget: float) -> float:
    """The share that, kept in all layers from the second on, uses the budget up.

    Raises:
        InvalidOption: The budget is below what text and the first layer take, or it is all.
    """
    least = shape.flop_share((1.0, *[STEP] * (shape.num_layers - 1)))
    if not least <= budget < 1:
        raise InvalidOption(
            "tune", "budget", f"was {budget:g}; with these prompts it can be from {math.ceil(least * 1e3) / 1e3:g} to 1"
        )
    return largest(lambda last: shape.flop_share((1.0, *[last] * (shape.num_layers - 1))) <= budget, STEP, 1.0)


def unsearched(shape: Shape, budget: float) -> list[Schedule]:
    """The schedules that FastV at layer 1 or 2 and PyramidDrop would have under the budget, as far as it can be met."""
    num_layers = shape.num_layers
    ways: list[Callable[[float], Schedule]] = [
        lambda ratio: (1.0, *[written(ratio)] * (num_layers - 1)),
        lambda ratio: (1.0, 1.0, *[written(ratio)] * (num_layers - 2)),
        lambda ratio: (1.0, *(written(ratio ** (layer / (num_layers - 1))) for layer in range(1, num_layers))),
    ]
    found = [way(largest(lambda ratio, way=way: shape.flop_share(way(ratio)) <= budget, STEP, 1.0)) for way in ways]
    return [schedule for schedule in found if shape.flop_share(schedule) <= budget]


def search(shape: Shape, budget: float, num_trials: int, score: Callable[[Schedule], float]) -> Schedule:
    """The best of `num_trials` different schedules; of equally good ones the first that was tried.

    Args:
        score: Of a schedule, larger is better; asked once for each.
    """
    most = largest_last(shape, budget)

    def schedule_at(point: np.ndarray) -> Schedule:
        steepness = STEEPNESS[0] * (STEEPNESS[1] / STEEPNESS[0]) ** float(point[0])
        return fitted(shape, budget, steepness, STEP + (most - STEP) * float(point[1]))

    points = qmc.Sobol(2, scramble=False).random(NUM_CANDIDATES)[1:]  # the first Sobol point is a corner
    first = unsearched(shape, budget)
    candidates = list(dict.fromkeys([*first, *map(schedule_at, points)]))
    tried: dict[Schedule, float] = {}
    while len(tried) < min(num_trials, len(candidates)):
        left = [schedule for schedule in candidates if schedule not in tried]
        chosen = 0
        if len(tried) >= len(first) + NUM_FIRST:
            chosen = _most_promising(tried, left)
        tried[left[chosen]] = score(left[chosen])
    means, _ = _predicted(tried, list(tried))
    return list(tried)[int(np.argmax(means))]


def _most_promising(tried: dict[Schedule, float], candidates: list[Schedule]) -> int:
    """Which of the candidates has the largest expected improvement over the best score."""
    mean, deviation = _predicted(tried, candidates)
    gain = mean - max(tried.values())
    spread = np.maximum(deviation, 1e-9)
    return int(np.argmax(gain * norm.cdf(gain / spread) + spread * norm.pdf(gain / spread)))


def _predicted(tried: dict[Schedule, float], schedules: list[Schedule]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the scores of some schedules, by a Gaussian process over their shares."""
    kernel = ConstantKernel(1.0) * Matern(length_scale=0.3, nu=2.5) + WhiteKernel(1e-2)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound of the kernel is reached on flat scores
        process.fit(np.array(list(tried)), np.array(list(tried.values())))
    predicted: Any = process.predict(np.array(schedules), return_std=True)
    return predicted
