"""Who takes part in the next pass, and with how many rows. Pure policy: no model, no tensors.

Every pass first takes one row of each answer that decodes, then goes on with prompts that are under way, then takes
what was drafted, then admits waiting ones while slots, free blocks and the token budget last. The line is first come,
first served within a priority, and its head is never passed by: so everyone is served. Who has waited longer than
`max_wait_s` goes before all priorities. When blocks run out, the last in line gives up its rows and computes them again
later; for drafts nobody has to.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.sequence import Sequence
from mm.plugins.drafter import NO_DRAFT


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one engine.

    Attributes:
        max_num_seqs: Answers decoded at a time.
        max_batch_tokens: Rows of one pass; a longer prompt goes in several.
        max_waiting: Requests that may wait; more are refused.
        max_wait_s: Waiting time behind which a request goes before all priorities.
    """

    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_waiting: int = 1024
    max_wait_s: float = 30.0


@dataclass(frozen=True)
class ScheduledChunk:
    """`count` rows of an answer in the next pass."""

    answer: Sequence
    count: int


@dataclass(frozen=True, kw_only=True)
class SchedulerOutput:
    """The next pass.

    Attributes:
        decoding: Answers that take one row each.
        chunks: The rows of the others: prompts, and answers with drafts.
    """

    decoding: list[Sequence]
    chunks: list[ScheduledChunk]

    @property
    def num_rows(self) -> int:
        return len(self.decoding) + sum(item.count for item in self.chunks)

    @property
    def answers(self) -> list[Sequence]:
        return [*self.decoding, *(item.answer for item in self.chunks)]

    @property
    def has_prompts(self) -> bool:
        return any(not item.answer.is_decoding for item in self.chunks)


class Scheduler:
    """The line and those being served.

    Args:
        clock: For tests.
    """

    def __init__(
        self,
        cache: KVCache,
        prefixes: PrefixCache,
        limits: SchedulerConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cache, self._prefixes, self._limits, self._clock = cache, prefixes, limits, clock
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, answer: Sequence) -> None:
        """Put in line, by priority and order of arrival."""
        bisect.insort(self.waiting, answer, key=self._place)

    def remove(self, answer: Sequence) -> None:
        """Take out of the line or the pass; its rows are freed."""
        if answer.slot is not None:
            self.running.remove(answer)
            self._leave(answer)
        elif answer in self.waiting:
            self.waiting.remove(answer)

    def plan(self) -> SchedulerOutput:
        """The next pass. Room for its rows is there when it begins."""
        planned, needed = self._continue()
        budget = self._limits.max_batch_tokens - sum(item.count for item in planned)
        planned, needed = self._with_drafts(planned, needed, budget)
        budget = self._limits.max_batch_tokens - sum(item.count for item in planned)
        self._age()
        while self.waiting and budget > 0 and self._cache.num_free_seqs:
            answer = self.waiting[0]
            if answer.goes_whole and answer.most_rows() > budget and planned:
                break  # goes through whole: it waits for a pass with room, and alone it has any
            if not self._admit(answer, needed):
                break
            self.waiting.pop(0)
            planned.append(self._share(answer, budget))
            needed += self._blocks(planned[-1])
            budget -= planned[-1].count
        decoding = [item.answer for item in planned if _is_one_row(item.answer)]
        return SchedulerOutput(decoding=decoding, chunks=[item for item in planned if not _is_one_row(item.answer)])

    def _with_drafts(self, planned: list[ScheduledChunk], needed: int, budget: int) -> tuple[list[ScheduledChunk], int]:
        """Drafted rows too, as far as tokens and free blocks last: nobody has to leave for them."""
        for at, item in enumerate(planned):
            answer = item.answer
            if answer.draft.num_tokens:
                answer.draft = answer.draft.cut(max(0, budget))
                both = ScheduledChunk(answer, 1 + answer.draft.num_tokens)
                more = self._blocks(both) - self._blocks(item)
                if not self._prefixes.make_room(needed + more):
                    answer.draft = NO_DRAFT
                    continue
                planned[at], needed, budget = both, needed + more, budget - answer.draft.num_tokens
        return planned, needed

    def _continue(self) -> tuple[list[ScheduledChunk], int]:
        """Those being served, decoding ones first, each with what it needs, while blocks last; blocks needed."""
        budget = self._limits.max_batch_tokens
        planned = [ScheduledChunk(answer, 1) for answer in self.running if answer.is_decoding]
        needed = self._cache.num_blocks_for_each(np.array([item.answer.slot for item in planned], dtype=np.int64))
        if len(planned) <= budget and self._prefixes.make_room(needed):
            budget -= len(planned)
            line = sorted((answer for answer in self.running if not answer.is_decoding), key=self._place)
        else:
            planned, needed = [], 0
            line = sorted(self.running, key=lambda answer: (not answer.is_decoding, *self._place(answer)))
        for answer in line:
            if answer.slot is None or budget <= 0:
                continue
            item = self._share(answer, budget)
            while answer.slot is not None and not self._prefixes.make_room(needed + self._blocks(item)):
                victim = max(self.running, key=self._place)
                gone = next((p for p in planned if p.answer is victim), None)
                if gone is not None:
                    planned.remove(gone)
                    needed -= self._blocks(gone)
                    budget += gone.count
                self.preempt(victim)
            if answer.slot is not None:
                planned.append(item)
                needed += self._blocks(item)
                budget -= item.count
        return planned, needed

    def _share(self, answer: Sequence, budget: int) -> ScheduledChunk:
        most = answer.most_rows()
        return ScheduledChunk(answer, most if answer.goes_whole else min(most, budget))

    def _blocks(self, item: ScheduledChunk) -> int:
        assert item.answer.slot is not None
        return self._cache.num_blocks_for(item.answer.slot, item.count)

    def _admit(self, answer: Sequence, reserved: int) -> bool:
        """Give the answer a slot with what is already known of its rows, if the rest of them fits."""
        slot = self._cache.allocate()
        # What reducers may take out of the cache has to be the answer's own, so that it never needs a copy to go.
        known = self._prefixes.match([] if answer.job.evictors else answer.prefix)
        self._cache.share(slot, known)
        num_known = known.shape[1] * self._cache.shape.block_size
        # One block per layer is left for each of those being served, or they would soon push this one out again.
        growth = (len(self.running) + 1) * self._cache.shape.num_layers if self.running else 0
        if not self._prefixes.make_room(
            reserved + growth + self._cache.num_blocks_for(slot, answer.num_rows - num_known)
        ):
            self._cache.free(slot)
            return False
        answer.slot, answer.num_computed = slot, num_known
        if answer.job.admitted is None:  # what it finds when it comes back are its own rows
            self._prefixes.count(answer.job.prompt.length, num_known)
            answer.job.num_cached_tokens, answer.job.admitted = num_known, self._clock()
        self.running.append(answer)
        return True

    def fork(self, answer: Sequence, sibling: Sequence) -> bool:
        """Let a sibling begin from the same rows, if there is a slot and room for a copy of the last block."""
        layers = self._cache.shape.num_layers
        if not self._cache.num_free_seqs or not self._prefixes.make_room(layers * (len(self.running) + 1)):
            return False
        assert answer.slot is not None
        sibling.slot, sibling.num_computed = self._cache.fork(answer.slot), answer.num_computed
        self.running.append(sibling)
        return True

    def preempt(self, answer: Sequence) -> None:
        """Free the rows; back in line, at its old place."""
        self.running.remove(answer)
        self._leave(answer)
        answer.job.num_preemptions += 1
        self.num_preemptions += 1
        self.add(answer)

    def _leave(self, answer: Sequence) -> None:
        assert answer.slot is not None
        self._cache.free(answer.slot)
        answer.slot, answer.num_computed, answer.draft = None, 0, NO_DRAFT

    def _age(self) -> None:
        """Who has waited too long goes to the front."""
        late = self._clock() - self._limits.max_wait_s
        if any(answer.job.priority > -PRIORITY_LIMIT and answer.job.arrived < late for answer in self.waiting):
            for answer in self.waiting:
                if answer.job.arrived < late:
                    answer.job.priority = -PRIORITY_LIMIT
            self.waiting.sort(key=self._place)

    def _place(self, answer: Sequence) -> tuple[int, int]:
        return answer.job.priority, answer.order


def _is_one_row(answer: Sequence) -> bool:
    return answer.is_decoding and not answer.draft.num_tokens


PRIORITY_LIMIT = 1 << 31
"""Beyond what requests may ask for."""
