"""Decides which sequences take part in the next step, and with how many tokens. Policy only: no model, no tensors.

Each step takes, in this order: one token of every sequence that decodes; more chunks of prompts that are being
computed; draft tokens; and new sequences from the waiting queue, while cache entries, free blocks and the token budget
last. The queue is ordered by priority and then by arrival. Its first sequence is never overtaken, so every sequence is
served in the end. A sequence that has waited longer than `max_wait_s` comes before all priorities.

When the cache is full, the sequence that is last in this order is preempted: its blocks are freed, and it is recomputed
later. Nothing is ever preempted to make room for drafts.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.kv_transfer.rows import ReceivedRows
from mm.engine.sequence import Sequence, SequenceStatus
from mm.plugins.drafter import NO_DRAFT


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one engine.

    Attributes:
        max_num_seqs: Sequences that are decoded at a time.
        max_num_batched_tokens: Tokens of one step. A longer prompt is computed in several chunks.
        max_waiting: Requests that may wait; more are refused.
        max_wait_s: Waiting time after which a sequence comes before all priorities.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    max_wait_s: float = 30.0


@dataclass(frozen=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of a sequence."""

    seq: Sequence
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class SchedulerOutput:
    """What the next step computes.

    Attributes:
        decode: Sequences of which one token is computed.
        chunks: Tokens of the others: parts of prompts, and newest tokens with their drafts.
    """

    decode: list[Sequence]
    chunks: list[ScheduledChunk]

    @property
    def num_scheduled_tokens(self) -> int:
        return len(self.decode) + sum(item.num_tokens for item in self.chunks)

    @property
    def seqs(self) -> list[Sequence]:
        return [*self.decode, *(item.seq for item in self.chunks)]

    @property
    def has_prefill(self) -> bool:
        return any(not item.seq.is_decoding for item in self.chunks)


class Scheduler:
    """The waiting queue and the running sequences.

    Args:
        clock: Replaced by tests.
    """

    def __init__(
        self,
        cache: KVCache,
        prefix_cache: PrefixCache,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache, self._prefix_cache, self._config, self._clock = cache, prefix_cache, config, clock
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.num_preemptions = 0
        self._oldest_arrival = math.inf  # nothing that waits, and was not raised, has arrived earlier

    def add(self, seq: Sequence) -> None:
        """Put a sequence into the waiting queue, by priority and order of arrival."""
        seq.status = SequenceStatus.WAITING
        bisect.insort(self.waiting, seq, key=_order)
        if not _is_raised(seq):
            self._oldest_arrival = min(self._oldest_arrival, seq.request.arrival_time)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out of the queue or out of the running ones, and free its blocks."""
        if seq.seq_index is not None:
            (self.parked if seq.status is SequenceStatus.PARKED else self.running).remove(seq)
            self._free(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED

    def park(self, seq: Sequence) -> None:
        """Compute no more of a sequence. Its blocks stay until `remove`; nothing is preempted among parked ones."""
        seq.status = SequenceStatus.PARKED
        if seq.seq_index is not None:
            self.running.remove(seq)
            self.parked.append(seq)

    def admit_received(self) -> Iterator[tuple[Sequence, ReceivedRows]]:
        """Give sequences that another engine has computed their entries in the cache, while they are next in line."""
        while self.waiting and (rows := self.waiting[0].received) is not None and self._cache.num_free_seqs:
            growth = len(self.running) * self._cache.shape.num_layers
            if not self._prefix_cache.make_room(growth + rows.num_blocks(self._cache.shape)):
                return
            seq = self.waiting.pop(0)
            seq.seq_index, seq.num_computed_tokens = self._cache.allocate(), rows.state.num_computed_tokens
            rows.load(self._cache, seq.seq_index)
            seq.status, seq.received = SequenceStatus.RUNNING, None
            self.running.append(seq)
            yield seq, rows

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. The cache has room for everything in it."""
        self._remove_skipped_blocks()
        scheduled, num_blocks = self._schedule_running()
        budget = self._config.max_num_batched_tokens - sum(item.num_tokens for item in scheduled)
        scheduled, num_blocks = self._with_drafts(scheduled, num_blocks, budget)
        budget = self._config.max_num_batched_tokens - sum(item.num_tokens for item in scheduled)
        self._raise_overdue()
        while self.waiting and budget > 0 and self._cache.num_free_seqs:
            seq = self.waiting[0]
            if seq.received is not None:
                break  # `admit_received` takes it before the next step
            if seq.must_prefill_in_one_chunk and seq.max_chunk_tokens > budget and scheduled:
                break  # it waits for a step with enough room; a step that it has alone always has
            if not self._admit(seq, num_blocks):
                break
            self.waiting.pop(0)
            scheduled.append(self._next_chunk(seq, budget))
            num_blocks += self._num_blocks(scheduled[-1])
            budget -= scheduled[-1].num_tokens
        decode, chunks = list[Sequence](), list[ScheduledChunk]()
        for item in scheduled:
            if _is_plain_decode(item.seq):
                decode.append(item.seq)
            else:
                chunks.append(item)
        return SchedulerOutput(decode=decode, chunks=chunks)

    def _remove_skipped_blocks(self) -> None:
        """Free the blocks before sliding windows, of prompts only when the prefix cache has them."""
        if self._cache.windows:
            found = [s.seq_index for s in self.running if s.is_past_prompt or not self._prefix_cache.enabled]
            self._cache.remove_skipped_blocks(np.array(found, dtype=np.int64))

    def _with_drafts(
        self, scheduled: list[ScheduledChunk], num_blocks: int, budget: int
    ) -> tuple[list[ScheduledChunk], int]:
        """Add draft tokens as far as the token budget and free blocks last."""
        for i, item in enumerate(scheduled):
            seq = item.seq
            if seq.spec is not None and seq.draft.num_tokens:
                seq.spec.draft = seq.draft.cut(max(0, budget))
                both = ScheduledChunk(seq, 1 + seq.draft.num_tokens)
                more = self._num_blocks(both) - self._num_blocks(item)
                if not self._prefix_cache.make_room(num_blocks + more):
                    seq.spec.draft = NO_DRAFT
                    continue
                scheduled[i], num_blocks, budget = both, num_blocks + more, budget - seq.draft.num_tokens
        return scheduled, num_blocks

    def _schedule_running(self) -> tuple[list[ScheduledChunk], int]:
        """The running sequences, those that decode first, while blocks last; and the blocks that they need."""
        budget = self._config.max_num_batched_tokens
        scheduled = [ScheduledChunk(seq, 1) for seq in self.running if seq.is_decoding]
        num_blocks = self._cache.num_blocks_for_each(
            np.array([item.seq.seq_index for item in scheduled], dtype=np.int64)
        )
        if len(scheduled) <= budget and self._prefix_cache.make_room(num_blocks):
            budget -= len(scheduled)
            rest = sorted((seq for seq in self.running if not seq.is_decoding), key=_order)
        else:
            scheduled, num_blocks = list[ScheduledChunk](), 0
            rest = sorted(self.running, key=lambda seq: (not seq.is_decoding, *_order(seq)))
        for seq in rest:
            if not _is_running(seq) or budget <= 0:
                continue
            item = self._next_chunk(seq, budget)
            while _is_running(seq) and not self._prefix_cache.make_room(num_blocks + self._num_blocks(item)):
                victim = max(self.running, key=_order)
                gone = next((other for other in scheduled if other.seq is victim), None)
                if gone is not None:
                    scheduled.remove(gone)
                    num_blocks -= self._num_blocks(gone)
                    budget += gone.num_tokens
                self.preempt(victim)
            if _is_running(seq):
                scheduled.append(item)
                num_blocks += self._num_blocks(item)
                budget -= item.num_tokens
        return scheduled, num_blocks

    def _next_chunk(self, seq: Sequence, budget: int) -> ScheduledChunk:
        """As many tokens as there is room for, but none behind a border at which states are to be kept."""
        longest = seq.max_chunk_tokens
        if seq.must_prefill_in_one_chunk:
            return ScheduledChunk(seq, longest)
        borders = seq.snapshot_borders if self._prefix_cache.enabled else ()
        ahead = [border - seq.num_computed_tokens for border in borders if border > seq.num_computed_tokens]
        return ScheduledChunk(seq, min(longest, budget, *ahead))

    def _num_blocks(self, item: ScheduledChunk) -> int:
        assert item.seq.seq_index is not None
        return self._cache.num_blocks_for(item.seq.seq_index, item.num_tokens)

    def _admit(self, seq: Sequence, num_reserved_blocks: int) -> bool:
        """Give a sequence an entry in the cache that starts with its cached prefix, if the rest of its tokens fits."""
        seq_index = self._cache.allocate()
        # Tokens that reducers may remove from the cache have to be in blocks of its own: then nothing has to be copied.
        cached = self._prefix_cache.match([] if seq.request.cache_pruners else seq.block_hashes)
        self._cache.share(seq_index, cached)
        self._prefix_cache.begin(seq_index, seq.block_hashes[: cached.shape[1]])
        num_cached_tokens = cached.shape[1] * self._cache.shape.block_size
        # One block per layer stays free for every running sequence. Otherwise they would soon preempt this one.
        growth = (len(self.running) + 1) * self._cache.shape.num_layers if self.running else 0
        num_blocks = self._cache.num_blocks_for(seq_index, seq.num_tokens - num_cached_tokens)
        if not self._prefix_cache.make_room(num_reserved_blocks + growth + num_blocks):
            self._cache.free(seq_index)
            return False
        seq.seq_index, seq.num_computed_tokens, seq.status = seq_index, num_cached_tokens, SequenceStatus.RUNNING
        if seq.request.first_scheduled_time is None:  # after a preemption it finds its own blocks, which is no hit
            self._prefix_cache.count(seq.num_prompt_tokens, num_cached_tokens)
            seq.request.num_cached_tokens, seq.request.first_scheduled_time = num_cached_tokens, self._clock()
        self.running.append(seq)
        return True

    def fork(self, seq: Sequence, sibling: Sequence) -> bool:
        """Start a sibling from the same blocks, if there is a free entry and room to copy the last block."""
        num_blocks = self._cache.shape.num_layers * (len(self.running) + 1)
        if not self._cache.num_free_seqs or not self._prefix_cache.make_room(num_blocks):
            return False
        assert seq.seq_index is not None
        sibling.seq_index, sibling.num_computed_tokens = self._cache.fork(seq.seq_index), seq.num_computed_tokens
        sibling.status = SequenceStatus.RUNNING
        self.running.append(sibling)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Free a sequence's blocks and put it back into the queue, where it was before."""
        self.running.remove(seq)
        self._free(seq)
        seq.request.num_preemptions += 1
        self.num_preemptions += 1
        self.add(seq)

    def _free(self, seq: Sequence) -> None:
        assert seq.seq_index is not None
        self._cache.free(seq.seq_index)
        seq.seq_index, seq.num_computed_tokens = None, 0
        if seq.spec is not None:
            seq.spec.draft = NO_DRAFT

    def _raise_overdue(self) -> None:
        """Move sequences that have waited too long to the front."""
        overdue = self._clock() - self._config.max_wait_s
        if self._oldest_arrival >= overdue:
            return
        for seq in self.waiting:
            if seq.request.arrival_time < overdue:
                seq.request.priority = -PRIORITY_LIMIT
        self.waiting.sort(key=_order)
        others = (seq.request.arrival_time for seq in self.waiting if not _is_raised(seq))
        self._oldest_arrival = min(others, default=math.inf)


def _is_running(seq: Sequence) -> bool:
    """Whether it holds an entry in the cache. Preempting another sequence may take it away."""
    return seq.seq_index is not None


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival_index


def _is_raised(seq: Sequence) -> bool:
    return seq.request.priority <= -PRIORITY_LIMIT


def _is_plain_decode(seq: Sequence) -> bool:
    return seq.is_decoding and (seq.spec is None or not seq.spec.draft.num_tokens)


PRIORITY_LIMIT = 1 << 31
"""Larger than any priority that a request may ask for."""
