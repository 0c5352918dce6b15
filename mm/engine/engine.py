"""The engine: takes requests whose media are encoded, and answers all of them together.

`submit` and `cancel` may be called from any thread. `step` runs one pass and hands out what it gave; whoever runs the
engine calls it again and again: a server from a thread of its own, `events` from the thread that waits for an answer.
One lock lets one of them in at a time, so the cache and the line have one owner.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import abc
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm.config import OnError, SpeculationLimits
from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded
from mm.engine.attention.base import AttentionBackend, build_attention
from mm.engine.cache_pruning import evict
from mm.engine.input_processor import add_hooks, answer_length, with_positions
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.loop import OutputQueue
from mm.engine.model_runner import Chunk, DecodeBatch, ModelRunner
from mm.engine.output_processor import SequenceOutput
from mm.engine.sampling.sampler import SampledToken
from mm.engine.sampling.sampler_factory import SamplerFactory
from mm.engine.scheduler import ScheduledChunk, Scheduler, SchedulerConfig, SchedulerOutput
from mm.engine.sequence import EngineRequest, OutputSink, Sequence
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.spec_decode.spec_state import StepResult
from mm.engine.spec_decode.verifier import Rows, TreeVerification, verify
from mm.engine.stats import Counters, EngineStats
from mm.engine.summary import summary
from mm.errors import CapacityError, DeadlineExceeded, EngineError, MmError, ReducerFault
from mm.plugins.capabilities import capabilities_of
from mm.plugins.reducer import Reducer

if TYPE_CHECKING:
    from mm.engine.attention.cuda_graphs import DecodeGraphs

log = logging.getLogger(__name__)


class LLMEngine:
    """One model's decoder with its cache.

    Args:
        family: The decoder side of a checkpoint: language model, template, splice.
        limits: Bounds of the line and of a pass.
        kv_bytes: Size of the cache.
        share_prefixes: Whether prompts begin with what earlier ones left.
        speculation: What may be drafted; None is nothing.
        record_steps: Whether decoding steps are recorded where the device can replay them.
        on_error: What a reducer's fault does to its request, see `ReducerPolicy`.
    """

    def __init__(
        self,
        family: Any,
        *,
        limits: SchedulerConfig,
        kv_bytes: int,
        share_prefixes: bool = True,
        speculation: SpeculationLimits | None = None,
        record_steps: bool = True,
        on_error: OnError = "fail",
    ) -> None:
        self.engine_id = uuid.uuid4().hex
        self.family, self.limits = family, limits
        self._on_error: OnError = on_error
        self.samplers = SamplerFactory(family)
        shape = family.language.kv_cache_spec
        num_blocks = kv_bytes // shape.block_bytes
        if num_blocks < shape.num_layers:
            least = shape.num_layers * shape.block_bytes
            raise EngineError(f"a KV cache of {kv_bytes} bytes is too small; {least} hold {shape.block_size} tokens")
        record_steps = record_steps and shape.device.type == "cuda"
        self.cache = KVCache(shape, num_blocks=num_blocks, max_num_seqs=limits.max_num_seqs + record_steps)
        self.prefixes = PrefixCache(self.cache, enabled=share_prefixes)
        self._scheduler = Scheduler(self.cache, self.prefixes, limits)
        attention = build_attention(self.cache)
        self._pass = ModelRunner(family.language, attention, self._record(attention) if record_steps else None)
        self.speculation = SpecDecoder(family, speculation or SpeculationLimits(), share_prefixes=share_prefixes)
        if self.speculation.is_on:
            self.speculation.calibrate(self._pass, limits.max_batch_tokens)
        self._lock = threading.Lock()
        self._arrivals: queue.SimpleQueue[list[Sequence]] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._answers: set[Sequence] = set()
        self._counters = Counters()
        self._draining = False
        self.wake = threading.Event()

    def _record(self, attention: AttentionBackend) -> DecodeGraphs | None:
        from mm.engine.attention.cuda_graphs import build_graphs

        width = self.cache.shape.num_blocks(self.family.max_context_tokens)
        return build_graphs(
            self.family.language, attention, max_num_seqs=self.limits.max_num_seqs, max_num_blocks=width
        )

    # ── taking requests ───────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self, request: Request, encoded: abc.Sequence[Encoded], sink: OutputSink, reducer: Reducer, spec: str
    ) -> EngineRequest:
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
        prompt = with_positions(prompt, request.vision.positions or capabilities_of(reducer).positions)
        max_new_tokens = answer_length(request, prompt, self.family.max_context_tokens, self.cache)
        samplers = self.samplers.make(request.sampling, prompt)
        before = time.perf_counter()
        job = EngineRequest(
            request=request,
            encoded=encoded,
            prompt=prompt,
            sink=sink,
            reducer=spec,
            priority=request.priority,
            deadline=None if request.timeout_s is None else before + request.timeout_s,
            num_left=len(samplers),
            faults=[item.fault for item in encoded if item.fault],
        )
        add_hooks(job, reducer, self.family.language.num_layers, on_error=self._on_error)
        answers = [
            Sequence(
                job=job,
                sampler=s,
                output=SequenceOutput(self.samplers.vocabulary, s, request.sampling, max_new_tokens),
                drafting=self.speculation.drafting(request),
            )
            for s in samplers
        ]
        answers[0].siblings = answers[1:]
        names = job.block_hashes(self.cache.shape.block_size)
        for answer in answers:
            answer.prefix = list(names)
        with self._door:
            self._check_room()  # again: others may have come in meanwhile
            for answer in answers:
                answer.order = next(self._counters.order)
            self._arrivals.put(answers)
        self.wake.set()
        return job

    def cancel(self, job: EngineRequest) -> None:
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

    def close(self) -> None:
        """Let go of the threads that compile schemas."""
        self.samplers.close()

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
            speculation=self.speculation.stats.copy(),
        )

    def events(self, job: EngineRequest, feed: OutputQueue) -> Generator[Event]:
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
        if num_served := min(len(self._answers), self.limits.max_num_seqs):
            decoding = [answer for answer in self._scheduler.running if answer.is_decoding]
            self.speculation.propose(decoding, self.limits.max_batch_tokens, num_served)
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
                _end(job)
            elif job.deadline is not None and now > job.deadline:
                self._fail(job, DeadlineExceeded("the request took longer than it may"))

    def _run(self, plan: SchedulerOutput) -> None:
        began, has_prompts = self.speculation.clock(), plan.has_prompts
        last = [answer.output.token_ids[-1] for answer in plan.decoding]
        texts = [item.answer.generated(item.count) for item in plan.chunks]
        ids = torch.tensor(last + [token for text in texts for token in text], dtype=torch.int64)
        rows = self.family.language.embed(ids)
        chunks, at, watched = [], len(last), self.speculation.watched(plan.answers)
        for item, text in zip(plan.chunks, texts, strict=True):
            chunk = item.answer.chunk(item.count, rows[at : at + len(text)] if text else None)
            chunk.watch = watched.get(item.answer, frozenset())
            chunks.append(chunk)
            at += len(text)
        decoding = self._decoding(plan.decoding, rows[: len(last)])
        if decoding is not None and watched:
            decoding.watch = frozenset().union(*(watched.get(answer, ()) for answer in plan.decoding))
        start = time.perf_counter()
        logits = self._pass.run(chunks, decoding)
        self._counters.model_s += time.perf_counter() - start
        rounds: list[StepResult] = []
        for i, answer in enumerate(plan.decoding):
            answer.num_computed += 1
            seen = decoding.states if decoding is not None and answer in watched else {}
            states = {name: state[i : i + 1] for name, state in seen.items()}
            rounds.append(StepResult(answer, last[i], i, TreeVerification(), states))
        row = len(rounds)
        for item, chunk in zip(plan.chunks, chunks, strict=True):
            rounds += self._begun(item, chunk, row)
            row += chunk.num_logits
        self._emit(rounds, logits)
        if any(one.walk.draft.num_tokens for one in rounds):
            self.speculation.stats.verify_s += time.perf_counter() - start
        if not has_prompts:
            num_drafted = plan.num_rows - len(plan.answers)
            self.speculation.took(len(plan.answers), num_drafted, self.speculation.clock() - began)
        self.speculation.finish(rounds, logits)

    def _begun(self, item: ScheduledChunk, chunk: Chunk, row: int) -> list[StepResult]:
        """What a chunk gives: one or more tokens to its answer, a token to each sibling, or nothing yet."""
        answer = item.answer
        if answer.draft.num_tokens:
            return [StepResult(answer, answer.output.token_ids[-1], row, TreeVerification(answer.draft), chunk.states)]
        root = answer.newest_token
        states = {name: state[-1:] for name, state in chunk.states.items()}
        return [StepResult(one, root, row, TreeVerification(), states) for one in self._advance(item, chunk)]

    def _decoding(self, answers: abc.Sequence[Sequence], rows: torch.Tensor) -> DecodeBatch | None:
        if not answers:
            return None
        places = torch.tensor([[answer.position for answer in answers]], device=rows.device)
        return DecodeBatch(slots=np.array([answer.slot for answer in answers]), embeddings=rows, positions=places)

    def _advance(self, item: ScheduledChunk, chunk: Chunk) -> list[Sequence]:
        """Count a chunk's rows as computed; the answers that its last row gives a token to."""
        answer = item.answer
        self.speculation.keep_prompt_states(answer, answer.num_computed, chunk)
        answer.num_computed += item.count
        if chunk.error is not None and not self._blame(answer.job, chunk.error):
            return []
        if answer.job.evictors and answer.num_computed == answer.job.prompt.length:
            self._evict(answer, chunk)
        if not chunk.num_logits or answer not in self._answers:
            return []
        return [answer] if answer.output.token_ids else self._prompt_done(answer)

    def _prompt_done(self, answer: Sequence) -> list[Sequence]:
        """The answers that the prompt's last row now gives a token to."""
        assert answer.slot is not None
        self.prefixes.put(answer.slot, answer.prefix)
        ready = [answer]
        for sibling in answer.siblings:
            if sibling.drafting is not None and answer.drafting is not None:
                sibling.drafting.kept = list(answer.drafting.kept)
            if self._scheduler.fork(answer, sibling):
                ready.append(sibling)
            else:
                self._scheduler.add(sibling)
        answer.siblings = []
        return ready

    def _evict(self, answer: Sequence, chunk: Chunk) -> None:
        """Let the reducers of the decode stage take rows out; only blocks that stay as they are may be shared."""
        job = answer.job
        assert answer.slot is not None
        untouched, fault = evict(self.cache, answer.slot, job.prompt, chunk, job.evictors)
        del answer.prefix[untouched // self.cache.shape.block_size :]
        if fault is not None:
            self._blame(job, fault)

    def _blame(self, job: EngineRequest, error: MmError) -> bool:
        """Whether the request goes on: a fault of a reducer is only noted where that is wanted."""
        if self._on_error == "fail" or not isinstance(error, ReducerFault):
            self._fail(job, error)
            return False
        if str(error) not in job.faults:
            log.warning("request_id=%s reducer_fault=%s", job.request.request_id, error, exc_info=error.__cause__)
            job.faults.append(str(error))
        return True

    def _emit(self, rounds: abc.Sequence[StepResult], logits: torch.Tensor) -> None:
        """Give each answer its tokens: one, and those that follow as long as its draft had them."""
        walks, rows = [one.walk for one in rounds], Rows(logits)

        def say(alive: list[int]) -> list[int | None]:
            going = [rounds[i] for i in alive]
            chosen = rows.draw(
                [one.first + one.walk.row for one in going],
                [one.walk for one in going],
                [one.answer.sampler for one in going],
                [one.answer.output.position for one in going],
            )
            return [self._say(one, token) for one, token in zip(going, chosen, strict=True)]

        verify(walks, say)
        drafted = [one for one in rounds if one.walk.draft.num_tokens and one.answer.slot is not None]
        for one in drafted:
            assert one.answer.slot is not None
            self.cache.keep_accepted(one.answer.slot, one.walk.draft.num_tokens + 1, one.walk.path)
            one.answer.num_computed += len(one.walk.path)
        now = time.perf_counter()
        for one in rounds:
            self.speculation.count(one)
        for one in rounds:
            self._settle(one, now)

    def _say(self, one: StepResult, chosen: SampledToken | EngineError) -> int | None:
        """Make a token part of an answer; None where that ends it."""
        answer, job = one.answer, one.answer.job
        if answer not in self._answers:
            return None  # a sibling's failure took the request away
        if isinstance(chosen, EngineError):
            self._fail(job, chosen)
            return None
        first = job.first_token is None
        job.first_token = job.first_token or time.perf_counter()
        is_drafted = one.walk.child_with(chosen.token_id) is not None
        try:
            delta = answer.output.push(chosen, job.prompt.length if first else None, is_drafted=is_drafted)
            job.sink.put(delta)
        except Exception as error:
            log.exception("an answer cannot go on: request_id=%s", job.request.request_id)
            self._fail(job, EngineError(f"a token could not be added to the answer: {type(error).__name__}"))
            return None
        job.num_completion_tokens += 1
        one.said.append(chosen.token_id)
        return chosen.token_id if answer.output.finish_reason is None else None

    def _settle(self, one: StepResult, now: float) -> None:
        """Note when tokens came, and let go of an answer that is over."""
        answer = one.answer
        if answer not in self._answers or not one.said:
            return
        if answer.last_token is not None:
            for _ in one.said:
                self._counters.inter_token_s.observe((now - answer.last_token) / len(one.said))
        answer.last_token = now
        if answer.output.finish_reason is not None:
            self._finish(answer, now)

    def _finish(self, answer: Sequence, now: float) -> None:
        job = answer.job
        if answer.slot is not None and job.shares_prompt:
            size = self.cache.shape.block_size
            if answer.num_computed // size > len(answer.prefix):
                self.prefixes.put(answer.slot, job.block_hashes(size, answer.output.token_ids[:-1]))
        self._scheduler.remove(answer)
        self._answers.discard(answer)
        self.speculation.close(answer)
        job.num_left -= 1
        if not job.num_left:
            job.is_over = True
            try:
                job.sink.put(summary(job, now))
            except Exception as error:
                log.exception("a summary was not taken: request_id=%s", job.request.request_id)
                _end(job, EngineError(f"the summary could not be handed over: {type(error).__name__}"))
            else:
                _end(job)

    def _fail(self, job: EngineRequest, error: BaseException) -> None:
        if any(answer.job is job for answer in self._answers):
            self._forget(job)
            _end(job, error)

    def _forget(self, job: EngineRequest) -> None:
        job.is_over = True
        for answer in [answer for answer in self._answers if answer.job is job]:
            self.speculation.close(answer)
            self._scheduler.remove(answer)
            self._answers.discard(answer)


def _end(job: EngineRequest, error: BaseException | None = None) -> None:
    """Tell the sink. One that cannot be told any more is nobody else's trouble."""
    try:
        job.sink.end(error)
    except Exception:
        log.exception("an end was not taken: request_id=%s", job.request.request_id)
