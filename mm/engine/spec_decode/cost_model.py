"""How long a pass of the decoder takes, as it is learned while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a pass whose times are told apart."""
NEAREST = [0] + [min(ROWS, key=lambda rows: abs(rows - num)) for num in range(1, 2 * ROWS[-1])]
"""Number of rows to that of `ROWS` under which its time is kept."""
ROW_SHARE = 0.001
"""Of a pass, that another row takes at the least: no row is free, however times err."""
NUM_SAMPLES = 9
WARM_S = 1.0
"""Seconds for which a pass of each number of rows is run before any is measured. The first of its number is slow: on a
CPU it takes a small model ten times as long, since oneDNN generates code for every shape."""
MOST_WARM = 64
"""Rows up to which each number is run, and some are measured."""
REFRESH = 8
"""Passes after which what was summed up of their times is summed up anew."""


class Median:
    """Of the last few values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=NUM_SAMPLES)
        self.value = 0.0

    def observe(self, value: float) -> None:
        self._values.append(value)
        ordered = sorted(self._values)
        self.value = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


class CostModel:
    """Seconds that a pass takes, by how many answers it serves and how many drafted rows it verifies.

    What a drafted row adds is learned at each batch size; before that it is what a row adds to one long chunk.
    """

    def __init__(self) -> None:
        self._chunk = np.array([0.0, 1.0]), np.array([0.0, 1.0])
        self._plain: dict[int, Median] = {}
        self._added: dict[int, dict[int, Median]] = {}
        self._tables: dict[int, list[float]] = {}
        self._unseen: dict[int, float] = {}
        self._age = 0

    def observe(self, num_answers: int, num_drafted: int, seconds: float) -> None:
        """Note a pass in which nothing but decoding was done."""
        self._age += 1
        if self._age >= REFRESH:
            self._tables, self._unseen, self._age = {}, {}, 0
        if num_answers >= len(NEAREST) or num_drafted >= len(NEAREST):
            return
        if not num_drafted:
            self._plain.setdefault(num_answers, Median()).observe(seconds)
        elif num_answers in self._plain:
            added = self._added.setdefault(NEAREST[num_answers], {}).setdefault(NEAREST[num_drafted], Median())
            added.observe(seconds - self._plain[num_answers].value)

    def plain(self, num_answers: int) -> float:
        """Seconds of a pass in which so many answers decode without drafts."""
        if known := self._plain.get(num_answers):
            return known.value
        if num_answers not in self._unseen:
            self._unseen[num_answers] = self._guessed(num_answers)
        return self._unseen[num_answers]

    def _guessed(self, num_answers: int) -> float:
        """By what passes of other batch sizes take, and by a chunk of as many rows before there were any."""
        if not self._plain:
            return float(self._chunk_seconds(np.array([num_answers]))[0])
        counts = sorted(self._plain)
        near = min(max(num_answers, counts[0]), counts[-1])
        found = float(np.interp(near, counts, [self._plain[count].value for count in counts]))
        here, there = self._chunk_seconds(np.array([num_answers, near]))
        return found * float(here / there)

    def is_known(self, num_answers: int) -> bool:
        """Whether passes of so many answers have been seen without drafts."""
        return num_answers in self._plain or num_answers >= len(NEAREST)

    def seconds(self, num_answers: int, num_drafted: np.ndarray) -> np.ndarray:
        """Of passes in which so many answers decode and so many drafted rows are verified."""
        rows, plain = np.array([0, *ROWS], dtype=float), self.plain(num_answers)
        added = self._chunk_seconds(num_answers + rows) - self._chunk_seconds(np.array([float(num_answers)]))
        known = sorted(self._added.get(NEAREST[min(num_answers, len(NEAREST) - 1)], {}).items())
        if known:  # what rows of a chunk take, and by how much that was wrong for about as many rows
            wrong = [median.value - added[1 + ROWS.index(count)] for count, median in known]
            added = added + np.interp(rows, [0, *(count for count, _ in known)], [0.0, *wrong])
        added = np.maximum.accumulate(np.maximum(added, ROW_SHARE * plain * rows))
        return plain + _interpolated(num_drafted, rows, added)

    def table(self, num_answers: int) -> list[float]:
        """(256,) seconds of passes with 0, 1, ... drafted rows; may be some passes old."""
        if num_answers not in self._tables:
            self._tables[num_answers] = self.seconds(num_answers, np.arange(ROWS[-1])).tolist()
        return self._tables[num_answers]

    def _chunk_seconds(self, rows: np.ndarray) -> np.ndarray:
        return _interpolated(rows, *self._chunk)

    def calibrate(self, run: Callable[[int], float], most: int) -> None:
        """Measure passes of one chunk of up to `most` rows; `run` gives the seconds of one."""
        warm_up(run, most)
        rows = [count for count in ROWS if count <= most]
        found = [min(run(count) for _ in range(4)) for count in rows]  # much makes a pass slower, nothing faster
        self._tables, self._unseen = {}, {}
        self._chunk = np.array(rows, dtype=float), np.maximum.accumulate(found)  # more rows never take less


def warm_up(run: Callable[[int], float], most: int) -> None:
    """Run each number of rows once, up to `most`, as long as there is time; `run` gives the seconds of one."""
    spent = 0.0
    for count in range(1, most + 1):
        if spent >= WARM_S:
            return
        spent += run(count)


def _interpolated(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Straight lines between what is known; beyond it goes on as between the last two."""
    found = np.interp(at, known, values)
    if len(known) > 1:
        found = found + (values[-1] - values[-2]) / (known[-1] - known[-2]) * np.maximum(at - known[-1], 0)
    return found
