"""What `demos.bench.reducers` measured, read from its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from serve.evaluation.intervals import NUM_RESAMPLES, SEED, Resamples, interval
from serve.evaluation.items import Item

FULL, BASE, GOAL = "none", "divprune", 0.9
"""What the others are measured against, before and after reduction, and the share of right answers that is good."""

TASKS_AT = 0.1
"""The ratio at which tasks are shown one by one, and methods compared with DivPrune."""


class Results:
    """One file of `demos.bench.reducers`.

    Attributes:
        lines: One per method and ratio; those at ratio 1 that were not asked everything are in `same`.
        same: Method to (answers that equal those of `none` at ratio 1, answers compared).
    """

    def __init__(self, path: Path, items: dict[str, Item]) -> None:
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.name, self.settings, self.machine = path.stem, head["settings"], head["machine"]
        full = next(line for line in lines if line["method"] == FULL)
        self.full, self.lines = full, [line for line in lines if line["keep_ratio"] < 1 or line is full]
        self.same = {
            line["method"]: _same(line, full) for line in lines if line["keep_ratio"] == 1 and line is not full
        }
        self._items = [items[item_id] for item_id in full["asked"]]
        self.tasks = list(dict.fromkeys(item.task for item in self._items))
        self._task = np.array([self.tasks.index(item.task) for item in self._items])
        self._media = np.unique([item.media_index for item in self._items], return_inverse=True)[1]
        num_media = int(self._media.max()) + 1
        rng = np.random.default_rng(SEED)
        self._draws = rng.multinomial(num_media, np.full(num_media, 1 / num_media), size=NUM_RESAMPLES)

    def right(self, line: dict[str, Any]) -> np.ndarray:
        """bool (items,)."""
        good = set(line["right"])
        return np.array([item.id in good for item in self._items])

    def score(self, line: dict[str, Any]) -> float:
        """Mean over tasks of right answers."""
        right = self.right(line)
        return float(np.mean([right[self._task == t].mean() for t in range(len(self.tasks))]))

    def scores(self, line: dict[str, Any]) -> np.ndarray:
        """The score in every resample of the media; a task of which a resample has nothing is left out of it."""
        right, weights = self.right(line), self._draws[:, self._media].astype(float)
        shares = []
        for t in range(len(self.tasks)):
            mine = self._task == t
            total = weights[:, mine].sum(axis=1)
            with np.errstate(invalid="ignore"):
                shares.append((weights[:, mine] @ right[mine]) / total)
        return np.nanmean(shares, axis=0)

    def task_share(self, line: dict[str, Any], task: str) -> tuple[float, float, float]:
        """Right answers of one task with the ends of the interval."""
        mine = self._task == self.tasks.index(task)
        draws = Resamples(self._media[mine].tolist(), f"{task} all")
        share = draws.share(self.right(line)[mine])
        return share.value, share.low, share.high

    def over(self, line: dict[str, Any], other: dict[str, Any], task: str | None = None) -> tuple[float, float, float]:
        """By how much the score, or the share of one task, is above that of another line, question by question."""
        if task is None:
            return self.score(line) - self.score(other), *interval(self.scores(line) - self.scores(other))
        mine = self._task == self.tasks.index(task)
        draws = Resamples(self._media[mine].tolist(), f"{task} all")
        gap = draws.difference(self.right(line)[mine], self.right(other)[mine])
        return gap.value, gap.low, gap.high

    def at(self, ratio: float) -> list[dict[str, Any]]:
        """The methods at this ratio, best first."""
        lines = [line for line in self.lines if line["keep_ratio"] == ratio and line["method"] != FULL]
        return sorted(lines, key=self.score, reverse=True)

    def find(self, method: str, ratio: float) -> dict[str, Any] | None:
        return next((line for line in self.at(ratio) if line["method"] == method), None)


def _same(line: dict[str, Any], full: dict[str, Any]) -> tuple[int, int]:
    texts = full["texts"]
    return sum(texts[item_id] == text for item_id, text in line["texts"].items()), len(line["texts"])
