"""Shares of right answers with intervals: a seeded bootstrap over media, as questions on one picture hang together.

The bootstrap of a share that is 0 or 1 has no width; the exact binomial bound stands in for it. Numbers depend on
nothing but the outcomes, their media, and the name of the cell: adding a task or a reducer changes no other interval.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95
SEED = 20


@dataclass(frozen=True)
class Share:
    """`value` of `num_items`, with the ends of its interval."""

    value: float
    low: float
    high: float
    num_items: int


class Resamples:
    """Resampled media of one cell; share it between columns to compare them on the same draws.

    Args:
        media: One number per item: which medium it asks about.
        name: Of the cell; seeds the draws.
    """

    def __init__(self, media: Sequence[int], name: str) -> None:
        self._clusters = np.unique(np.asarray(media), return_inverse=True)[1]
        self._num_clusters = int(self._clusters.max()) + 1
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
        even = np.full(self._num_clusters, 1 / self._num_clusters)
        self._weights = rng.multinomial(self._num_clusters, even, size=NUM_RESAMPLES).astype(float)
        self._counts = self._weights @ self._sums(np.ones(len(media)))

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._clusters, weights=values, minlength=self._num_clusters)

    def means(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """The mean of `values` (one per item) in every resample."""
        return self._weights @ self._sums(np.asarray(values, float)) / self._counts

    def share(self, right: Sequence[bool] | np.ndarray) -> Share:
        """The share of right answers."""
        outcomes = np.asarray(right, float)
        value, count = float(outcomes.mean()), len(outcomes)
        low, high = interval(self.means(outcomes))
        if value in (0.0, 1.0):
            bound = ((1 - LEVEL) / 2) ** (1 / self._num_clusters)
            low, high = (bound, 1.0) if value else (0.0, 1 - bound)
        return Share(value, low, high, count)

    def difference(self, right: Sequence[bool], than: Sequence[bool]) -> Share:
        """By how much one column is above another on the same items."""
        gaps = np.asarray(right, float) - np.asarray(than, float)
        return Share(float(gaps.mean()), *interval(self.means(gaps)), len(gaps))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
