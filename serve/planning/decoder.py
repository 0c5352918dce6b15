"""A decoder in simulated time. It takes the same steps as `mm.engine.scheduler`, which a test compares.

A step has one token of every sequence that decodes, then chunks of prompts in order of arrival, while the token budget
lasts. Steps in which nothing but decoding happens are computed many at a time, until a sequence ends, the cache is full
or a request arrives: their seconds grow evenly with the context.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from serve.planning.curves import Curves
from serve.planning.events import Device, Job

BLOCK = 16
"""Tokens of a block of the KV cache."""


class Sequence:
    """A request in a decoder.

    Attributes:
        index: Of the request.
        order: Of arrival here.
        num_tokens: To prefill: the prompt, and after a preemption what was generated too.
        num_computed: Of them.
        num_left: Output tokens that are missing.
    """

    __slots__ = ("begun", "computed", "end_step", "index", "is_decoding", "num_left", "num_tokens", "order")

    def __init__(self, index: int, num_tokens: int, num_left: int, *, prefilled: bool = False) -> None:
        self.index, self.num_tokens, self.num_left = index, num_tokens, num_left
        self.order = self.end_step = -1
        self.computed = num_tokens if prefilled else 0
        self.begun = self.is_decoding = False


@dataclass(frozen=True)
class Outputs:
    """Who is told about tokens: of the first one, and of the last one."""

    first_token: Callable[[Sequence], None]
    finished: Callable[[Sequence], None]


class Decoder:
    """One decoder replica, or one that only prefills: then its sequences want one token.

    Attributes:
        num_tokens: Output tokens that it has made.
        num_prefilled: Prompt tokens that it has computed.
        num_recomputed: Of them, those that a preemption made it compute again.
    """

    def __init__(self, device: Device, curves: Curves, outputs: Outputs) -> None:
        assert curves.prefill is not None
        assert curves.decode is not None
        self._device, self._outputs, self._bounds = device, outputs, curves.engine
        self._prefill_s: Callable[[int, int], float] = lru_cache(maxsize=100_000)(curves.prefill)
        self._decode_s: Callable[[int, int], float] = lru_cache(maxsize=100_000)(curves.decode)
        self._step_s = curves.step_s
        self._kv_tokens = math.inf if curves.engine.kv_tokens is None else curves.engine.kv_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._ends: list[tuple[int, int, Sequence]] = []
        self._num_decoding = self._step = self._context = self._kv_used = self._num_seen = 0
        self._job: Job | None = None
        self._run: tuple[int, float, float] | None = None
        self.on_step: Callable[[int, list[tuple[Sequence, int]]], None] | None = None
        self.num_in = self.num_out = self.num_tokens = self.num_prefilled = self.num_preemptions = (
            self.num_recomputed
        ) = 0
        self.is_open = True

    @property
    def num_held(self) -> int:
        return self.num_in - self.num_out

    @property
    def said(self) -> dict[str, float]:
        """What a decoder publishes for the router, as `routing_stats`."""
        used = self._kv_used / self._kv_tokens if self._kv_tokens < math.inf else 0.0
        waiting = sum(seq.num_tokens - seq.computed for seq in self.waiting)
        return {"kv_usage": used, "num_waiting": len(self.waiting), "num_waiting_tokens": waiting}

    def put(self, seq: Sequence) -> None:
        """A request arrives. The step under way ends before it is looked at."""
        self.num_in += 1
        seq.order = self._num_seen
        self._num_seen += 1
        self.waiting.append(seq)
        if self._job is None:
            self._next()
        elif self._run is not None and len(self.running) < self._bounds.max_num_seqs:
            self._cut_run()

    def take_waiting(self) -> list[Sequence]:
        """Remove what has not begun, for another decoder."""
        taken = [seq for seq in self.waiting if not seq.begun]
        self.waiting = [seq for seq in self.waiting if seq.begun]
        self.num_in -= len(taken)
        return taken

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _next(self, _: object = None) -> None:
        """Start the next step, or many steps that only decode."""
        self._make_room()
        chunks = self._chunks()
        num = self._num_decoding
        if chunks:
            seconds = sum(self._prefill_s(tokens, seq.computed) for seq, tokens in chunks)
            seconds -= self._step_s * (len(chunks) - 1)
            if num:
                seconds += self._decode_s(num, self._context // num) - self._step_s
            self._run = None
            self._job = self._device.start(max(seconds, 0.0), self._end_mixed, chunks)
        elif num:
            steps = self._ends[0][0] - self._step
            if self._kv_tokens < math.inf:
                steps = max(1, min(steps, int(self._kv_tokens - self._kv_used) // num))
            mean = self._context // num
            first = self._decode_s(num, mean)
            last = self._decode_s(num, mean + steps - 1) if steps > 1 else first
            slope = (last - first) / (steps - 1) if steps > 1 else 0.0
            self._run = (steps, first, slope)
            self._job = self._device.start(_sum(steps, first, slope), self._end_run, None)
        else:
            self._job = self._run = None
        if self.on_step is not None and self._job is not None:
            self.on_step(num, chunks)

    def _chunks(self) -> list[tuple[Sequence, int]]:
        """Prompt tokens of the next step: of prompts that have begun, then of waiting ones that fit."""
        budget = self._bounds.max_batch_tokens - self._num_decoding
        chunks = list[tuple[Sequence, int]]()
        for seq in self._prefilling:
            if budget <= 0:
                break
            tokens = min(seq.num_tokens - seq.computed, budget)
            chunks.append((seq, tokens))
            budget -= tokens
        while self.waiting and budget > 0 and len(self.running) < self._bounds.max_num_seqs:
            seq = self.waiting[0]
            growth = BLOCK * (len(self.running) + 1) if self.running else 0
            if self._kv_used + seq.num_tokens + growth > self._kv_tokens:
                break
            self.waiting.pop(0)
            self.running.append(seq)
            self._kv_used += seq.num_tokens
            seq.begun = True
            if seq.computed == seq.num_tokens:  # its KV came from a prefill replica
                self._begin_decoding(seq)
                budget -= 1
                continue
            self._prefilling.append(seq)
            tokens = min(seq.num_tokens, budget)
            chunks.append((seq, tokens))
            budget -= tokens
        return chunks

    def _begin_decoding(self, seq: Sequence) -> None:
        seq.end_step, seq.is_decoding = self._step + seq.num_left, True
        heapq.heappush(self._ends, (seq.end_step, seq.order, seq))
        self._num_decoding += 1
        self._context += seq.num_tokens

    def _end_mixed(self, chunks: list[tuple[Sequence, int]]) -> None:
        self._job = None
        ended = self._after_steps(1)
        firsts = list[Sequence]()
        for seq, tokens in chunks:
            seq.computed += tokens
            self.num_prefilled += tokens
            if seq.computed == seq.num_tokens:
                self._prefilling.remove(seq)
                firsts.append(seq)
        for seq in firsts:
            self.num_tokens += 1
            seq.num_left -= 1
            if seq.num_left:
                self._begin_decoding(seq)
            else:
                self._leave(seq, seq.num_tokens)
                ended.append(seq)
        for seq in firsts:
            self._outputs.first_token(seq)
        for seq in ended:
            self._outputs.finished(seq)
        if self._job is None:
            self._next()

    def _end_run(self, _: object) -> None:
        assert self._run is not None
        self._job = None
        for seq in self._after_steps(self._run[0]):
            self._outputs.finished(seq)
        if self._job is None:
            self._next()

    def _after_steps(self, steps: int) -> list[Sequence]:
        """Every sequence that decodes has got `steps` tokens; returns those that are complete."""
        num = self._num_decoding
        self._step += steps
        self._context += num * steps
        self._kv_used += num * steps
        self.num_tokens += num * steps
        ended = list[Sequence]()
        while self._ends and self._ends[0][0] <= self._step:
            end, _, seq = heapq.heappop(self._ends)
            if not seq.is_decoding or end != seq.end_step:
                continue  # it was preempted since
            size = seq.num_tokens + seq.num_left
            seq.num_left, seq.is_decoding = 0, False
            self._num_decoding -= 1
            self._context -= size
            self._leave(seq, size)
            ended.append(seq)
        return ended

    def _leave(self, seq: Sequence, num_kv_tokens: int) -> None:
        self.running.remove(seq)
        self._kv_used -= num_kv_tokens
        self.num_out += 1

    def _cut_run(self) -> None:
        """Let the steps under way end with the present one."""
        assert self._run is not None
        assert self._job is not None
        steps, first, slope = self._run
        done = self._device.done_of(self._job)
        cut = min(steps, max(1, _steps_in(done, first, slope)))
        if cut < steps:
            self._run = (cut, first, slope)
            self._device.cut(self._job, _sum(cut, first, slope))

    def _make_room(self) -> None:
        """Preempt the last arrivals while the next step's tokens do not fit."""
        while self._kv_used + self._num_decoding > self._kv_tokens and len(self.running) > 1:
            seq = max(self.running, key=_order)
            self.running.remove(seq)
            self.num_preemptions += 1
            made = seq.num_left - (seq.end_step - self._step) if seq.is_decoding else 0
            self._kv_used -= seq.num_tokens + made
            if seq.is_decoding:
                self._num_decoding -= 1
                self._context -= seq.num_tokens + made
                self._ends.remove((seq.end_step, seq.order, seq))
                heapq.heapify(self._ends)
                seq.is_decoding = False
            else:
                self._prefilling.remove(seq)
            self.num_recomputed += seq.computed + made
            seq.num_tokens += made
            seq.num_left -= made
            seq.computed = 0
            bisect.insort(self.waiting, seq, key=_order)


def _order(seq: Sequence) -> int:
    return seq.order


def _sum(steps: int, first: float, slope: float) -> float:
    """Seconds of steps that take `first`, `first + slope`, and so on."""
    return steps * first + slope * steps * (steps - 1) / 2


def _steps_in(done: float, first: float, slope: float) -> int:
    """The number of steps, the present one included, after `done` seconds."""
    if abs(slope) * 1e9 < first or first <= 0:
        steps = done / first if first > 0 else 1.0
    else:
        half = first - slope / 2
        steps = (math.sqrt(max(0.0, half * half + 2 * slope * done)) - half) / slope
    return math.ceil(steps - 1e-9)
