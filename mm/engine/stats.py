"""What an engine counts."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.engine.spec_decode.metrics import SpecDecodeStats

STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Bounds of the histogram of tokens per step."""
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
"""Bounds of the histogram of seconds between two tokens."""


class Histogram:
    """How many values fell between which bounds.

    Attributes:
        bounds: Ascending. A value belongs to the first bound that is not below it.
        counts: One per bound, and one for values above all of them.
        total: Sum of the values.
    """

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0) -> None:
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
        engine_id: A new one after a restart, when all counts start at 0.
        num_running: Sequences that are being computed.
        num_waiting: Sequences in the waiting queue.
        num_waiting_tokens: Tokens of the waiting sequences that are not computed yet.
        kv_used_bytes, kv_total_bytes: Of the block pool. Blocks that only the prefix cache holds count as used.
        kv_prefix_bytes: Blocks that the prefix cache holds.
        kv_idle_bytes: Those of them that no sequence holds. They are freed when room is needed.
        num_preemptions: How often a sequence was preempted.
        prefix_queries, prefix_hits: Prompt tokens that were looked up in the prefix cache, and found.
        num_steps, num_scheduled_tokens: Steps, and the tokens of all of them.
        step_s, model_s: Seconds in steps, and in the model's part of them.
        step_tokens: Histogram of the tokens per step.
        inter_token_s: Histogram of the seconds between two tokens of a sequence. Tokens that come together share them.
        num_parked: Sequences that another engine takes over and has not confirmed yet. Their blocks count as used.
        num_handed_over, num_received: Requests that left to another engine, and came from one.
        kv_sent_bytes, kv_received_bytes: What moved with them: keys, values, states.
        kv_saved_bytes: What more would have left if reducers had dropped nothing.
        spec_decode: What drafting has done.
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
    num_scheduled_tokens: int
    step_s: float
    model_s: float
    step_tokens: Histogram
    inter_token_s: Histogram
    num_parked: int = 0
    num_handed_over: int = 0
    num_received: int = 0
    kv_sent_bytes: int = 0
    kv_received_bytes: int = 0
    kv_saved_bytes: int = 0
    spec_decode: SpecDecodeStats = field(default_factory=SpecDecodeStats)

    @property
    def kv_usage(self) -> float:
        """Share of the pool that sequences hold, 0 to 1."""
        return (self.kv_used_bytes - self.kv_idle_bytes) / max(1, self.kv_total_bytes)


@dataclass(kw_only=True)
class Counters:
    """What an engine counts while it runs; see `EngineStats`."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_S))
    num_handed_over: int = 0
    num_received: int = 0
    kv_sent_bytes: int = 0
    kv_received_bytes: int = 0
    kv_saved_bytes: int = 0

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Count a step that took `seconds`."""
        self.num_steps += 1
        self.num_scheduled_tokens += num_tokens
        self.step_tokens.observe(num_tokens)
        self.step_s += seconds
