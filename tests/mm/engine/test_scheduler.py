"""Who takes part in a pass: budgets, the order of the line, who has to give way, and that everyone is served."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from mm.data.request import Request
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from mm.engine.sequence import EngineRequest, Sequence
from mm.models.kv_cache_spec import KVCacheSpec
from tests.helpers.engines import Recorder

LAYERS, SIZE = 3, 4
SHAPE = KVCacheSpec(
    num_layers=LAYERS, num_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"), block_size=SIZE
)


class Length:
    """Of an seq's output, all that the scheduler asks of one."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []


@dataclass
class Line:
    """A scheduler without a model: rows are counted and never computed."""

    num_rows: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    now: float = 0.0
    lengths: dict[Sequence, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens, max_wait_s=30
        )
        blocks = LAYERS * SHAPE.num_blocks(self.num_rows)
        self.cache = KVCache(SHAPE, num_blocks=blocks, max_num_seqs=self.max_num_seqs)
        self.prefixes = PrefixCache(self.cache)
        self.scheduler = Scheduler(self.cache, self.prefixes, config, clock=lambda: self.now)
        self._order = 0

    def arrive(self, num_prompt: int, num_answer: int = 4, *, priority: int = 0, whole: bool = False) -> Sequence:
        """A request for `num_answer` tokens; `whole` as with reducers inside the decoder."""
        ids = torch.arange(num_prompt) + 1000 * self._order
        prompt = Prompt(
            token_ids=ids,
            embeddings=torch.zeros(num_prompt, 2),
            positions=torch.arange(num_prompt)[None],
            next_position=num_prompt,
            is_visual=torch.zeros(num_prompt, dtype=torch.bool),
        )
        request = Request(request_id=str(self._order), messages=(), sampling=SamplingParams(max_new_tokens=num_answer))
        taken = EngineRequest(
            params=request, media=(), prompt=prompt, sink=Recorder(), priority=priority, arrival_time=self.now
        )
        taken.pruning_layers = {1: None} if whole else {}  # type: ignore[dict-item]
        seq = Sequence(request=taken, sampler=None, output=Length(), arrival_index=self._order)  # type: ignore[arg-type]
        seq.block_hashes = taken.block_hashes(SIZE)
        self._order += 1
        self.lengths[seq] = num_answer
        self.scheduler.add(seq)
        return seq

    def step(self) -> SchedulerOutput:
        """Plan, take the room, count the rows, give each complete seq a token."""
        plan = self.scheduler.schedule()
        if plan.decode:
            self.cache.append_slot_each(np.array([seq.seq_index for seq in plan.decode]))
        for item in plan.chunks:
            self.cache.append_slots(
                item.seq.seq_index, item.num_tokens
            )  # raises when the plan promised room that is not there
            item.seq.num_computed_tokens += item.num_tokens
        for seq in plan.decode:
            seq.num_computed_tokens += 1
        for seq in plan.seqs:
            if seq.num_uncomputed_tokens == 0:
                if not seq.output.token_ids:
                    self.prefixes.put(seq.seq_index, seq.block_hashes)
                seq.output.token_ids.append(0)
            if len(seq.output.token_ids) == self.lengths[seq]:
                self.leave(seq)
        self.now += 0.1
        return plan

    def leave(self, seq: Sequence) -> None:
        del self.lengths[seq]
        self.scheduler.remove(seq)

    def run(self, most_steps: int = 2000) -> int:
        for i in range(most_steps):
            if not self.lengths:
                return i
            assert self.step().num_scheduled_tokens, "there is work, and nobody does any"
        raise AssertionError(f"{len(self.lengths)} are not served after {most_steps} steps")


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_keeps_the_bounds_and_everyone_is_served(seed):
    """Plans fit the budget and the cache, name nobody twice, and leave no room unused that the head could have."""
    rng = random.Random(seed)
    line = Line(
        num_rows=rng.choice([40, 64, 160]), max_num_seqs=rng.choice([2, 5]), max_num_batched_tokens=rng.choice([3, 16])
    )
    preempted, left, steps = 0, 60, 0
    while left or line.lengths:
        while left and rng.random() < 0.3:
            left -= 1
            whole = rng.random() < 0.2
            most = line.max_num_batched_tokens if whole else 30
            line.arrive(rng.randint(1, most), rng.randint(1, 10), priority=rng.choice([0, 0, -5, 5]), whole=whole)
        if line.lengths and rng.random() < 0.02:
            line.leave(rng.choice(sorted(line.lengths, key=lambda seq: seq.arrival_index)))
        busy = bool(line.lengths)
        plan = line.step()
        assert plan.num_scheduled_tokens <= line.max_num_batched_tokens
        assert bool(plan.num_scheduled_tokens) == busy
        assert len(set(plan.seqs)) == len(plan.seqs) <= line.max_num_seqs
        assert all(item.num_tokens > 0 for item in plan.chunks)
        line.cache.check(line.prefixes.held)
        steps += 1
        assert steps < 3000
    preempted += line.scheduler.num_preemptions
    assert not line.scheduler.running
    assert not line.scheduler.waiting
    line.prefixes.clear()
    line.cache.check()
    assert line.cache.num_used_bytes == 0


def test_decoding_answers_go_on_while_a_long_prompt_goes_in_by_chunks():
    line = Line(max_num_batched_tokens=8)
    short = [line.arrive(2, 20), line.arrive(2, 20)]
    line.step()
    long = line.arrive(30, 2)
    for i in range(5):
        plan = line.step()
        assert plan.decode == short
        assert [(item.seq, item.num_tokens) for item in plan.chunks] == [(long, 6)], i
    assert len(long.output.token_ids) == 1
    assert long in line.step().decode


def test_a_prompt_that_has_to_go_whole_may_exceed_the_budget_only_alone():
    line = Line(max_num_batched_tokens=8)
    first = line.arrive(2, 3)
    line.step()
    whole = line.arrive(20, 1, whole=True)
    behind = line.arrive(2, 1)
    assert line.step().seqs == [first]  # the head is not passed by
    assert line.step().seqs == [first]
    plan = line.step()
    assert [(item.seq, item.num_tokens) for item in plan.chunks] == [(whole, 20)]
    line.run()
    assert behind not in line.lengths


def test_admission_waits_for_free_blocks_and_keeps_one_more_for_each():
    line = Line(num_rows=32)
    one = line.arrive(16, 6)
    line.step()
    two = line.arrive(13, 6)  # 4 of the 4 free blocks of a layer: one of them is the first one's next
    assert line.step().seqs == [one]
    assert two.seq_index is None
    assert line.cache.num_free_seqs == line.max_num_seqs - 1
    fits = line.arrive(2, 1)
    line.leave(two)
    assert set(line.step().seqs) == {one, fits}


def test_admission_leaves_a_block_of_each_layer_for_every_sequence_that_grows():
    line = Line(num_rows=32)
    one = line.arrive(13, 6)  # 4 of 8 blocks of a layer, and room in the last one
    line.step()
    two = line.arrive(16, 6)  # the other 4 blocks would just do, and nobody could grow
    assert line.step().seqs == [one]
    line.leave(two)
    fits = line.arrive(8, 6)  # 2 blocks, which leaves one for each of the two
    assert set(line.step().seqs) == {one, fits}


def test_a_fork_leaves_a_block_of_each_layer_for_every_sequence_that_grows():
    def fork(num_rows: int) -> bool:
        line = Line(num_rows=num_rows)
        one = line.arrive(6, 3)
        sibling = Sequence(request=one.request, sampler=None, output=Length(), arrival_index=1)  # type: ignore[arg-type]
        line.step()
        return line.scheduler.fork(one, sibling)

    assert not fork(12)  # 2 of 3 blocks are used: one is left for two sequences
    assert fork(16)


def test_the_last_in_line_gives_way_and_comes_back_at_its_place():
    line = Line(num_rows=48, max_num_batched_tokens=64)
    seqs = [line.arrive(8, 24, priority=priority) for priority in (0, -1, 0)]
    line.step()
    assert all(seq.seq_index is not None for seq in seqs)
    while all(seq.seq_index is not None for seq in seqs):
        line.prefixes.clear()
        line.step()
    (gone,) = [seq for seq in seqs if seq.seq_index is None]
    assert gone is seqs[2]  # lowest priority first, then who came last
    assert line.scheduler.num_preemptions == gone.request.num_preemptions == 1
    num_tokens = len(gone.output.token_ids)
    assert num_tokens > 0
    later = line.arrive(2, 1)
    assert line.scheduler.waiting == [gone, later]
    while gone.seq_index is None:
        line.prefixes.clear()
        plan = line.step()
    (item,) = [item for item in plan.chunks if item.seq is gone]
    assert item.num_tokens == 8 + num_tokens  # prompt and seq so far in one go
    line.run()


def test_the_first_in_line_always_gets_further():
    """However often the others give way, somebody never does: so the line moves."""
    line = Line(num_rows=40, max_num_batched_tokens=64)
    seqs = [line.arrive(4, 30) for _ in range(6)]
    line.run(most_steps=400)
    assert seqs[0].request.num_preemptions == 0
    assert line.scheduler.num_preemptions > 0


def test_priority_goes_first_and_equals_in_order_of_arrival():
    line = Line(max_num_seqs=1)
    arrived = [line.arrive(4, 1, priority=p) for p in (0, 5, -1, 0, -1)]
    served = []
    while line.lengths:
        served += line.step().seqs
    assert [arrived.index(seq) for seq in served] == [2, 4, 0, 3, 1]


def test_a_long_prompt_is_served_amid_a_stream_of_short_ones():
    line = Line(num_rows=64, max_num_batched_tokens=8)
    for _ in range(3):
        line.arrive(3, 8)
    long = line.arrive(50, 2)
    for _ in range(400):
        if long not in line.lengths:
            return
        if len(line.scheduler.waiting) < 4:
            line.arrive(3, 8)
        line.step()
    pytest.fail("not served after 400 steps")


def test_low_priority_is_served_at_last_amid_a_stream_of_high():
    line = Line(max_num_seqs=1)
    low = line.arrive(4, 1, priority=100)
    served_at = None
    for _ in range(1000):
        if low not in line.lengths:
            served_at = line.now
            break
        line.arrive(4, 1, priority=-100)
        line.step()
    assert served_at is not None
    assert 30 <= served_at < 40  # max_wait_s, and not much later


def test_a_fork_waits_in_line_when_there_is_no_slot():
    line = Line(max_num_seqs=1)
    one = line.arrive(6, 3)
    sibling = Sequence(request=one.request, sampler=None, output=Length(), arrival_index=1)  # type: ignore[arg-type]
    line.lengths[sibling] = 2
    line.step()
    assert not line.scheduler.fork(one, sibling)
    assert sibling.seq_index is None
    line.scheduler.add(sibling)
    line.run()


def test_a_fork_begins_from_the_same_rows():
    line = Line()
    one = line.arrive(6, 3)
    line.step()
    sibling = Sequence(request=one.request, sampler=None, output=Length(), arrival_index=1)  # type: ignore[arg-type]
    sibling.output.token_ids.append(0)
    line.lengths[sibling] = 3
    used = line.cache.num_used_bytes
    assert line.scheduler.fork(one, sibling)
    assert line.cache.num_used_bytes == used
    assert (sibling.num_computed_tokens, sibling.is_decoding) == (6, True)
    assert set(line.step().decode) == {one, sibling}
    line.run()
    line.cache.check(line.prefixes.held)


def test_an_entry_that_is_about_to_be_used_is_not_thrown_out_for_its_own_request():
    """The cache is full of idle entries; the request finds its own among the oldest."""
    line = Line(num_rows=32, max_num_batched_tokens=64)
    first = line.arrive(17, 1)
    line.step()
    line.arrive(13, 1)
    line.step()
    assert first not in line.lengths
    again = line.arrive(17, 2)
    again.block_hashes = list(first.block_hashes)
    plan = line.step()
    assert [(item.seq, item.num_tokens) for item in plan.chunks] == [(again, 1)]
    assert again.request.num_cached_tokens == 16
