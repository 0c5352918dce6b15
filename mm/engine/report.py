"""What the engine tells: figures of its own, events to those who wait, a summary of each request."""

from __future__ import annotations

import bisect
import itertools
import queue
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm.core.data import Event, KeptMap, Summary, Timings, Usage
from mm.engine.sequence import Job

STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)


class Histogram:
    """How many values fell between which bounds.

    Attributes:
        bounds: Ascending; a value belongs to the first bound that is not below it.
        counts: One per bound, and one for what is above all of them.
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


@dataclass(kw_only=True)
class SpeculationStats:
    """What drafting has done so far.

    Attributes:
        num_drafts: Drafts that were verified.
        num_draft_tokens, num_accepted_tokens: Tokens of these, and those that were right; no bonus token is counted.
        num_accepted_per_position: At each depth of a draft.
        num_target_steps, num_emitted_tokens: Times that a pass gave an answer tokens, with or without a
            draft, and the tokens.
        num_faults: Calls of a drafter that failed.
        draft_s: Seconds in drafters: proposing and taking note.
        verify_s: Seconds in passes that verified drafts, and in the walks behind them.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_position: list[int] = field(default_factory=list)
    num_target_steps: int = 0
    num_emitted_tokens: int = 0
    num_faults: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a pass with a draft gave, the bonus token included."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    @property
    def tokens_per_target_step(self) -> float:
        """Tokens that a pass gave an answer, with or without a draft: what predicts speed."""
        return self.num_emitted_tokens / max(1, self.num_target_steps)

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    def copy(self) -> SpeculationStats:
        return replace(self, num_accepted_per_position=list(self.num_accepted_per_position))


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
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

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


class Feed:
    """A sink that a thread reads from."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[Event | None, BaseException | None]] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._items.put((event, None))

    def end(self, error: BaseException | None = None) -> None:
        self._items.put((None, error))

    def take(self) -> tuple[Event | None, BaseException | None] | None:
        """The next event, (None, error) at the end, or None when nothing is there yet."""
        try:
            return self._items.get_nowait()
        except queue.Empty:
            return None


def summary(job: Job, now: float) -> Summary:
    """Of a request whose last token came at `now`."""
    assert job.admitted is not None
    assert job.first_token is not None
    kept = _kept(job)
    timings = Timings(
        load_s=sum(item.timings.load_s for item in job.encoded),
        encode_s=sum(item.timings.encode_s for item in job.encoded),
        reduce_s=sum(item.timings.reduce_s for item in job.encoded),
        queue_s=job.admitted - job.arrived,
        prefill_s=job.first_token - job.admitted,
        decode_s=now - job.first_token,
    )
    shown = kept if job.request.vision.return_map else ()
    return Summary(
        usage=_usage(job, kept),
        timings=timings,
        kept=shown,
        reducer=job.reducer,
        reducer_faults=tuple(dict.fromkeys(job.faults)),
    )


def _usage(job: Job, kept: Sequence[KeptMap]) -> Usage:
    def count(kind: str, what: str) -> int:
        return sum(getattr(item.tokens, what) for item in job.encoded if item.tokens.kind == kind)

    return Usage(
        num_prompt_tokens=job.prompt.length,
        num_completion_tokens=job.num_completion_tokens,
        num_cached_tokens=job.num_cached_tokens,
        num_accepted_tokens=job.num_accepted_tokens,
        num_rejected_tokens=job.num_drafted_tokens - job.num_accepted_tokens,
        num_drafts=job.num_drafts,
        num_image_tokens_in=count("image", "num_tokens_in"),
        num_image_tokens_prompt=count("image", "num_tokens"),
        num_image_tokens_kept=sum(len(item.kept) for item in kept if item.kind == "image"),
        num_video_tokens_in=count("video", "num_tokens_in"),
        num_video_tokens_prompt=count("video", "num_tokens"),
        num_video_tokens_kept=sum(len(item.kept) for item in kept if item.kind == "video"),
    )


def _kept(job: Job) -> tuple[KeptMap, ...]:
    """What is left of each item behind the last layer at which tokens were dropped."""
    maps = []
    left = None if job.drops is None else job.drops.origins.cpu()
    first = 0
    for item in job.encoded:
        tokens, indices = item.tokens, item.tokens.indices.cpu()
        if left is not None:
            indices = indices[left[(left >= first) & (left < first + tokens.num_tokens)] - first]
        first += tokens.num_tokens
        maps.append(KeptMap(kind=tokens.kind, grid=tokens.grid, kept=tuple(indices.tolist())))
    return tuple(maps)
