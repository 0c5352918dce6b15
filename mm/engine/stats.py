"""What an engine counts."""

from __future__ import annotations

import bisect
import itertools
from collections import abc
from dataclasses import dataclass, field
from typing import Any

from mm.engine.spec_decode.metrics import SpecDecodeStats

STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)


class Histogram:
    """How many values fell between which bounds.

    Attributes:
        bounds: Ascending; a value belongs to the first bound that is not below it.
        counts: One per bound, and one for what is above all of them.
        total: Sum of the values.
    """

    def __init__(self, bounds: abc.Sequence[float], counts: abc.Sequence[int] = (), total: float = 0.0) -> None:
        self.bounds, self.total = tuple(bounds), total
        self.counts = list(counts) or [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        return Histogram(self.bounds, self.counts, self.total)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine holds now and has done so far.

    Attributes:
        engine_id: Another one after a restart, which begins counting at 0.
        num_running, num_waiting: Answers being served, and in line.
        num_waiting_tokens: Rows that those in line still have to be given.
        kv_used_bytes, kv_total_bytes: Of the pool; blocks that only the prefix cache holds count as used.
        kv_prefix_bytes: Blocks that the prefix cache holds.
        kv_idle_bytes: Those among them that nobody else holds: they make room when it is needed.
        num_preemptions: Answers that had to give up their rows.
        prefix_queries, prefix_hits: Prompt rows looked up in the prefix cache, and found.
        num_steps, num_rows: Passes, and rows of all of them.
        step_s, model_s: Seconds in passes, and in the model's part of them.
        step_rows: Rows of each pass.
        inter_token_s: Seconds between two tokens of an answer; of several that came at once, each a share.
        speculation: What drafting has done.
    """

    engine_id: str
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    kv_used_bytes: int
    kv_total_bytes: int
    kv_prefix_bytes: int
    kv_idle_bytes: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    num_steps: int
    num_rows: int
    step_s: float
    model_s: float
    step_rows: Histogram
    inter_token_s: Histogram
    speculation: SpecDecodeStats = field(default_factory=SpecDecodeStats)

    @property
    def kv_usage(self) -> float:
        """Share of the pool that requests hold, 0 to 1."""
        return (self.kv_used_bytes - self.kv_idle_bytes) / max(1, self.kv_total_bytes)


@dataclass(kw_only=True)
class Counters:
    """What an engine counts as it runs; see `EngineStats`."""

    num_steps: int = 0
    num_rows: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
    step_rows: Histogram = field(default_factory=lambda: Histogram(STEP_ROWS))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_S))
    order: Any = field(default_factory=itertools.count)
