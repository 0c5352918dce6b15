"""How long a step of the target model takes, measured while the engine runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

TOKEN_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens for which times are kept apart."""
NEAREST_COUNT = [0] + [min(TOKEN_COUNTS, key=lambda count: abs(count - num)) for num in range(1, 2 * TOKEN_COUNTS[-1])]
"""Number of tokens to the entry of `TOKEN_COUNTS` under which its time is kept."""
MIN_TOKEN_SHARE = 0.001
"""Smallest cost of one more token, as a share of a step. Measured times err, but no token is free."""
NUM_SAMPLES = 9
"""Newest values that a median is taken of."""
WARM_UP_S = 1.0
"""Seconds in which steps of each number of tokens are run before any is measured. The first step of each number is
slow. With a small model on a CPU it takes ten times as long, because oneDNN generates code for every shape."""
MAX_WARM_TOKENS = 64
"""Each number of tokens up to this one is warmed up, and some are measured."""
REFRESH_INTERVAL = 8
"""Steps after which cached estimates are computed again."""


class Median:
    """The median of the last `NUM_SAMPLES` values, 0 before the first."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=NUM_SAMPLES)
        self.value = 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        ordered = sorted(self._values)
        self.value = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


class CostModel:
    """Seconds of a step, by the number of sequences that decode and of draft tokens that are verified.

    What draft tokens add to a step is measured at each batch size. Until then the model assumes what as many tokens add
    to a prefill chunk, which `calibrate` measures.
    """

    def __init__(self) -> None:
        self._chunk = np.array([0.0, 1.0]), np.array([0.0, 1.0])  # numbers of tokens, and their seconds
        self._decode: dict[int, Median] = {}  # by number of sequences
        self._added: dict[int, dict[int, Median]] = {}  # by numbers of sequences and of draft tokens
        self._tables: dict[int, list[float]] = {}
        self._estimates: dict[int, float] = {}
        self._num_steps = 0

    def record(self, num_seqs: int, num_draft_tokens: int, seconds: float) -> None:
        """Record the time of a step that did nothing but decode."""
        self._num_steps += 1
        if self._num_steps >= REFRESH_INTERVAL:
            self._tables, self._estimates, self._num_steps = {}, {}, 0
        if num_seqs >= len(NEAREST_COUNT) or num_draft_tokens >= len(NEAREST_COUNT):
            return
        if not num_draft_tokens:
            self._decode.setdefault(num_seqs, Median()).add(seconds)
        elif num_seqs in self._decode:
            by_count = self._added.setdefault(NEAREST_COUNT[num_seqs], {})
            added = by_count.setdefault(NEAREST_COUNT[num_draft_tokens], Median())
            added.add(seconds - self._decode[num_seqs].value)

    def decode_s(self, num_seqs: int) -> float:
        """Seconds of a step in which so many sequences decode without drafts. May be a few steps old."""
        if measured := self._decode.get(num_seqs):
            return measured.value
        if num_seqs not in self._estimates:
            self._estimates[num_seqs] = self._estimate_decode_s(num_seqs)
        return self._estimates[num_seqs]

    def _estimate_decode_s(self, num_seqs: int) -> float:
        """Seconds of a step at a batch size that was not measured.

        They are interpolated between the measured batch sizes. Outside of these, and where none was measured, they
        follow the times of a chunk of as many tokens.
        """
        if not self._decode:
            return float(self._chunk_s(np.array([num_seqs]))[0])
        counts = sorted(self._decode)
        nearest = min(max(num_seqs, counts[0]), counts[-1])
        measured = float(np.interp(nearest, counts, [self._decode[count].value for count in counts]))
        wanted_s, nearest_s = self._chunk_s(np.array([num_seqs, nearest]))
        return measured * float(wanted_s / nearest_s)

    def is_measured(self, num_seqs: int) -> bool:
        """Whether steps of so many sequences were measured without drafts. Always true for the largest batches."""
        return num_seqs in self._decode or num_seqs >= len(NEAREST_COUNT)

    def step_s(self, num_seqs: int, num_draft_tokens: np.ndarray) -> np.ndarray:
        """(n,) seconds of steps in which so many sequences decode and (n,) numbers of draft tokens are verified."""
        counts, decode_s = np.array([0, *TOKEN_COUNTS], dtype=float), self.decode_s(num_seqs)
        added = self._chunk_s(num_seqs + counts) - self._chunk_s(np.array([float(num_seqs)]))
        measured = sorted(self._added.get(NEAREST_COUNT[min(num_seqs, len(NEAREST_COUNT) - 1)], {}).items())
        if measured:  # correct the chunk's times by their error at the numbers that were measured
            errors = [median.value - added[1 + TOKEN_COUNTS.index(count)] for count, median in measured]
            added = added + np.interp(counts, [0, *(count for count, _ in measured)], [0.0, *errors])
        added = np.maximum.accumulate(np.maximum(added, MIN_TOKEN_SHARE * decode_s * counts))
        return decode_s + _interpolate(num_draft_tokens, counts, added)

    def step_table(self, num_seqs: int) -> list[float]:
        """(256,) seconds of steps with 0, 1, ... draft tokens. May be a few steps old."""
        if num_seqs not in self._tables:
            self._tables[num_seqs] = self.step_s(num_seqs, np.arange(TOKEN_COUNTS[-1])).tolist()
        return self._tables[num_seqs]

    def _chunk_s(self, num_tokens: np.ndarray) -> np.ndarray:
        return _interpolate(num_tokens, *self._chunk)

    def calibrate(self, run: Callable[[int], float], max_tokens: int) -> None:
        """Measure the time of one chunk, by its number of tokens.

        Args:
            run: Runs a chunk of so many tokens, and returns its seconds.
            max_tokens: Tokens of the largest chunk.
        """
        warm_up(run, max_tokens)
        counts = [count for count in TOKEN_COUNTS if count <= max_tokens]
        # The least of four: other load on the machine makes a step slower, and nothing makes it faster.
        seconds = [min(run(count) for _ in range(4)) for count in counts]
        self._tables, self._estimates = {}, {}
        self._chunk = np.array(counts, dtype=float), np.maximum.accumulate(seconds)  # more tokens never take less


def warm_up(run: Callable[[int], float], max_tokens: int) -> None:
    """Run a step of each number of tokens once, from 1 to `max_tokens`. Stops after `WARM_UP_S` seconds.

    Args:
        run: Runs a step of so many tokens, and returns its seconds.
    """
    total_s = 0.0
    for count in range(1, max_tokens + 1):
        if total_s >= WARM_UP_S:
            return
        total_s += run(count)


def _interpolate(at: np.ndarray, points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Linear interpolation between the points. After the last point it continues the last segment."""
    found = np.interp(at, points, values)
    if len(points) > 1:
        found = found + (values[-1] - values[-2]) / (points[-1] - points[-2]) * np.maximum(at - points[-1], 0)
    return found
