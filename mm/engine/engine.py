"""The engine: takes requests whose media are encoded, and answers all of them together.

`submit` and `cancel` may be called from any thread. `step` runs one pass and hands out what it gave; whoever runs the
engine calls it again and again: a server from a thread of its own, `events` from the thread that waits for an answer.
One lock lets one of them in at a time, so the cache and the line have one owner.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mm.core.data import Encoded, Event, Request
from mm.core.errors import CapacityError, ContextTooLong, DeadlineExceeded, EngineError, InvalidRequest, ReducerFault
from mm.core.plugins import Reducer, inner_stages
from mm.engine.attention import build_attention
from mm.engine.eviction import evict
from mm.engine.kv_cache import KVCache
from mm.engine.output import Output
from mm.engine.prefix_cache import PrefixCache
from mm.engine.report import INTER_TOKEN_S, STEP_ROWS, EngineStats, Feed, Histogram, summary
from mm.engine.samplers import SamplerFactory
from mm.engine.sampling import choose
from mm.engine.scheduler import Limits, Plan, Planned, Scheduler
from mm.engine.sequence import Answer, Job, Sink
from mm.engine.step import Chunk, Decoding, Pass

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Counters:
    num_steps: int = 0
    num_rows: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
    step_rows: Histogram = field(default_factory=lambda: Histogram(STEP_ROWS))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_S))
    order: Any = field(default_factory=itertools.count)


class Engine:
    """One model's decoder with its cache.

    Args:
        family: The decoder side of a checkpoint: language model, template, splice.
        limits: Bounds of the line and of a pass.
        kv_bytes: Size of the cache.
        share_prefixes: Whether prompts begin with what earlier ones left.
    """

    def __init__(self, family: Any, *, limits: Limits, kv_bytes: int, share_prefixes: bool = True) -> None:
        self.engine_id = uuid.uuid4().hex
        self.family, self.limits = family, limits
        self.samplers = SamplerFactory(family)
        shape = family.language.cache_shape
        num_blocks = kv_bytes // shape.block_bytes
        if num_blocks < shape.num_layers:
            least = shape.num_layers * shape.block_bytes
            raise EngineError(f"a KV cache of {kv_bytes} bytes is too small; {least} hold {shape.block_size} tokens")
        self.cache = KVCache(shape, num_blocks=num_blocks, num_slots=limits.max_num_seqs)
        self.prefixes = PrefixCache(self.cache, enabled=share_prefixes)
        self._scheduler = Scheduler(self.cache, self.prefixes, limits)
        self._pass = Pass(family.language, build_attention(self.cache))
        self._lock = threading.Lock()
        self._arrivals: queue.SimpleQueue[list[Answer]] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._answers: set[Answer] = set()
        self._counters = _Counters()
        self._draining = False
        self.wake = threading.Event()

    # ── taking requests ───────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request, encoded: Sequence[Encoded], sink: Sink, reducer: Reducer, spec: str) -> Job:
        """Take a request; its events go to `sink`. May wait for a schema to be compiled: not for the event loop.

        Args:
            reducer: How its media were reduced, and are to be reduced inside the decoder.
            spec: The same as text, for the summary.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: It cannot be answered as asked.
            CapacityError: Too many wait already, or the engine is being shut down.
        """
        self._check_room()
        prompt = self.family.splice(request.messages, [item.tokens for item in encoded])
        max_new_tokens = self._max_new_tokens(request, prompt.length, prompt.next_position)
        samplers = self.samplers.make(request.sampling, prompt)
        before = time.perf_counter()
        job = Job(
            request=request,
            encoded=encoded,
            prompt=prompt,
            sink=sink,
            reducer=spec,
            priority=request.priority,
            deadline=None if request.timeout_s is None else before + request.timeout_s,
            num_left=len(samplers),
        )
        self._add_hooks(job, reducer)
        answers = [
            Answer(job=job, sampler=s, output=Output(self.samplers.vocabulary, s, request.sampling, max_new_tokens))
            for s in samplers
        ]
        answers[0].siblings = answers[1:]
        names = job.names(self.cache.shape.block_size)
        for answer in answers:
            answer.prefix = list(names)
        with self._door:
            self._check_room()  # again: others may have come in meanwhile
            for answer in answers:
                answer.order = next(self._counters.order)
            self._arrivals.put(answers)
        self.wake.set()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a request. What it holds is freed at the next step, or at once when none is running."""
        job.cancelled.set()
        self.wake.set()
        if self._lock.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._lock.release()

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        self._draining = True

    def _check_room(self) -> None:
        if self._draining:
            raise CapacityError("the server is being stopped; ask another one", 5)
        waiting = len(self._scheduler.waiting) + self._arrivals.qsize()
        if waiting >= self.limits.max_waiting:
            raise CapacityError(f"{waiting} requests are waiting already; try again shortly", self._retry_after_s())

    def _retry_after_s(self) -> int:
        counters = self._counters
        step_s = counters.step_s / max(1, counters.num_steps)
        return max(1, min(60, round(step_s * len(self._scheduler.waiting))))

    def _max_new_tokens(self, request: Request, num_rows: int, next_position: int) -> int:
        asked = request.sampling.max_new_tokens
        context = self.family.max_context_tokens
        if context - next_position < max(1, asked or 0):
            raise ContextTooLong(next_position, asked or 1, context)
        shape = self.cache.shape
        room = self.cache.num_blocks // shape.num_layers * shape.block_size - num_rows
        if room < max(1, asked or 0):
            raise InvalidRequest(
                f"the prompt has {num_rows} tokens and {asked or 1} were asked for, but this server's KV cache holds "
                f"{room + num_rows}; shorten the prompt, keep fewer visual tokens, or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return asked or min(room, context - next_position)

    def _add_hooks(self, job: Job, reducer: Reducer) -> None:
        prefill, decode = inner_stages(reducer)
        num_layers = self.family.language.num_layers
        for stage in prefill:
            for layer in stage.layers(num_layers):
                if not 0 < layer < num_layers or layer in job.hooks:
                    raise InvalidRequest(
                        f"{type(stage).__name__} acts at layer {layer}; this model allows 1 to {num_layers - 1}, each "
                        "for one reducer",
                        "vision.reducer",
                    )
                job.hooks[layer] = stage
        job.evictors = decode
        if not job.prompt.is_visual.any():
            job.hooks, job.evictors = {}, ()

    # ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return bool(self._answers) or not self._arrivals.empty()

    @property
    def stats(self) -> EngineStats:
        counters, cache = self._counters, self.cache
        return EngineStats(
            engine_id=self.engine_id,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + self._arrivals.qsize(),
            num_waiting_tokens=sum(answer.num_todo for answer in list(self._scheduler.waiting)),
            kv_used_bytes=cache.num_used_bytes,
            kv_total_bytes=cache.num_blocks * cache.shape.block_bytes,
            kv_prefix_bytes=self.prefixes.num_bytes,
            kv_idle_bytes=self.prefixes.num_idle_bytes,
            num_preemptions=self._scheduler.num_preemptions,
            prefix_queries=self.prefixes.num_queries,
            prefix_hits=self.prefixes.num_hits,
            num_steps=counters.num_steps,
            num_rows=counters.num_rows,
            step_s=counters.step_s,
            model_s=counters.model_s,
            step_rows=counters.step_rows.copy(),
            inter_token_s=counters.inter_token_s.copy(),
        )

    def events(self, job: Job, feed: Feed) -> Generator[Event]:
        """A request's events, running the engine as long as nobody else does. Closing it cancels."""
        try:
            while True:
                while (item := feed.take()) is not None:
                    event, error = item
                    if event is not None:
                        yield event
                    elif error is not None:
                        raise error
                    else:
                        return
                with self._lock:
                    if feed._items.empty():
                        self._step()
        finally:
            job.cancelled.set()
            if not job.is_over:
                with self._lock:  # who runs the engine now may be the last to do so
                    self._reap()

    def step(self) -> bool:
        """One pass. Whether there was anything to do."""
        with self._lock:
            return self._step()

    def _step(self) -> bool:
        start = time.perf_counter()
        self._take_arrivals()
        self._reap()
        plan = self._scheduler.plan()
        num_rows = plan.num_rows
        if not num_rows:
            return False
        try:
            self._run(plan)
        except Exception as error:
            log.exception("a pass failed: rows=%d", num_rows)
            for answer in plan.answers:
                self._fail(answer.job, EngineError(f"a pass of the decoder failed: {type(error).__name__}"))
        self._counters.num_steps += 1
        self._counters.num_rows += num_rows
        self._counters.step_rows.observe(num_rows)
        self._counters.step_s += time.perf_counter() - start
        return True

    def _take_arrivals(self) -> None:
        while not self._arrivals.empty():
            answers = self._arrivals.get()
            self._answers.update(answers)
            self._scheduler.add(answers[0])

    def _reap(self) -> None:
        """Let go of the cancelled and the late."""
        self._take_arrivals()
        now = time.perf_counter()
        for answer in list(self._answers):
            job = answer.job
            if answer not in self._answers:
                continue  # went with its sibling
            if job.cancelled.is_set():
                self._forget(job)
                job.sink.end()
            elif job.deadline is not None and now > job.deadline:
                self._fail(job, DeadlineExceeded("the request took longer than it may"))

    def _run(self, plan: Plan) -> None:
        last = [answer.output.token_ids[-1] for answer in plan.decoding]
        texts = [item.answer.generated(item.count) for item in plan.chunks]
        ids = torch.tensor(last + [token for text in texts for token in text], dtype=torch.int64)
        rows = self.family.language.embed(ids)
        chunks, at = [], len(last)
        for item, text in zip(plan.chunks, texts, strict=True):
            chunks.append(item.answer.chunk(item.count, rows[at : at + len(text)] if text else None))
            at += len(text)
        start = time.perf_counter()
        logits = self._pass.run(chunks, self._decoding(plan.decoding, rows[: len(last)]))
        self._counters.model_s += time.perf_counter() - start
        for answer in plan.decoding:
            answer.num_computed += 1
        ready, sources = list(plan.decoding), list(range(len(plan.decoding)))
        row = len(ready)
        for item, chunk in zip(plan.chunks, chunks, strict=True):
            begun = self._advance(item, chunk)
            ready += begun
            sources += [row] * len(begun)
            row += chunk.num_logits
        if ready:
            self._emit(ready, logits if sources == list(range(logits.shape[0])) else logits[sources])

    def _decoding(self, answers: Sequence[Answer], rows: torch.Tensor) -> Decoding | None:
        if not answers:
            return None
        places = torch.tensor([[answer.position for answer in answers]], device=rows.device)
        return Decoding(slots=np.array([answer.slot for answer in answers]), embeddings=rows, positions=places)

    def _advance(self, item: Planned, chunk: Chunk) -> list[Answer]:
        """Count a chunk's rows as computed; the answers that its last row gives a token to."""
        answer = item.answer
        answer.num_computed += item.count
        if chunk.error is not None:
            self._fail(answer.job, chunk.error)
            return []
        if answer.job.evictors and answer.num_computed == answer.job.prompt.length:
            self._evict(answer, chunk)
        if not chunk.num_logits or answer not in self._answers:
            return []
        return [answer] if answer.output.token_ids else self._prompt_done(answer)

    def _prompt_done(self, answer: Answer) -> list[Answer]:
        """The answers that the prompt's last row now gives a token to."""
        assert answer.slot is not None
        self.prefixes.put(answer.slot, answer.prefix)
        ready = [answer]
        for sibling in answer.siblings:
            if self._scheduler.fork(answer, sibling):
                ready.append(sibling)
            else:
                self._scheduler.add(sibling)
        answer.siblings = []
        return ready

    def _evict(self, answer: Answer, chunk: Chunk) -> None:
        """Let the reducers of the decode stage take rows out; only blocks that stay as they are may be shared."""
        job = answer.job
        assert answer.slot is not None
        try:
            untouched = evict(self.cache, answer.slot, job.prompt, chunk, job.evictors)
        except ReducerFault as error:
            self._fail(job, error)
        else:
            del answer.prefix[untouched // self.cache.shape.block_size :]

    def _emit(self, answers: Sequence[Answer], logits: torch.Tensor) -> None:
        chosen = choose(logits, [a.sampler for a in answers], [a.output.position for a in answers])
        now = time.perf_counter()
        for answer, one in zip(answers, chosen, strict=True):
            job = answer.job
            if isinstance(one, EngineError):
                self._fail(job, one)
                continue
            if answer not in self._answers:
                continue  # a sibling's failure took the request away
            job.num_completion_tokens += 1
            if answer.last_token is not None:
                self._counters.inter_token_s.observe(now - answer.last_token)
            answer.last_token = now
            first = job.first_token is None
            job.first_token = job.first_token or now
            try:
                job.sink.put(answer.output.push(one, job.prompt.length if first else None))
            except Exception as error:
                log.exception("an answer cannot go on: request_id=%s", job.request.request_id)
                self._fail(job, EngineError(f"a token could not be added to the answer: {type(error).__name__}"))
                continue
            if answer.output.finish_reason is not None:
                self._finish(answer, now)

    def _finish(self, answer: Answer, now: float) -> None:
        job = answer.job
        if answer.slot is not None and job.shares_prompt:
            size = self.cache.shape.block_size
            if answer.num_computed // size > len(answer.prefix):
                self.prefixes.put(answer.slot, job.names(size, answer.output.token_ids[:-1]))
        self._scheduler.remove(answer)
        self._answers.discard(answer)
        job.num_left -= 1
        if not job.num_left:
            job.is_over = True
            job.sink.put(summary(job, now))
            job.sink.end()

    def _fail(self, job: Job, error: BaseException) -> None:
        if any(answer.job is job for answer in self._answers):
            self._forget(job)
            job.sink.end(error)

    def _forget(self, job: Job) -> None:
        job.is_over = True
        for answer in [answer for answer in self._answers if answer.job is job]:
            self._scheduler.remove(answer)
            self._answers.discard(answer)
