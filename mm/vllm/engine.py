"""vLLM as an engine of ours: requests become vLLM's, its tokens become our events.

As in the native engine, `submit` and `abort` may be called from any thread and only leave notes; `step` takes them in
and lets vLLM compute. What a token does to the text, when an answer ends and what its summary says is the same code.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia
from mm.engine.scheduler import SchedulerConfig
from mm.engine.sequence import EngineRequest, OutputSink, PrefillOnly
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.stats import Counters, EngineStats
from mm.engine.summary import summarise
from mm.errors import CapacityError, DeadlineExceeded, EngineError, InvalidRequest, MmError, SchemaNotFulfilled
from mm.models.family import CheckpointFamily
from mm.vllm.core import Core, CoreOutput
from mm.vllm.inputs import Choice, VllmInputs

log = logging.getLogger(__name__)


class VllmEngine:
    """One model's decoder, computed by vLLM.

    Args:
        family: Chat template, placeholders and positions of the checkpoint, without its decoder.
        core: vLLM, started.
        inputs: Makes choices of requests.
        config: Bounds of the waiting queue and of a step.
    """

    def __init__(self, family: CheckpointFamily, core: Core, inputs: VllmInputs, *, config: SchedulerConfig) -> None:
        self.engine_id, self.calls, self.capabilities = uuid.uuid4().hex, inputs.calls, inputs.capabilities
        self.family, self.inputs, self.config = family, inputs, config
        self.wake, self._lock = threading.Event(), threading.Lock()
        self._core, self._counters = core, Counters()
        self._arrivals, self._aborts = deque[list[Choice]](), deque[EngineRequest]()
        self._live: dict[EngineRequest, set[Choice]] = {}
        self._choices: dict[str, Choice] = {}
        self._held: OrderedDict[str, int] = OrderedDict()
        self._failure, self._is_draining = "", False

    # ── what arrives ──────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, params: Request, media: EncodedMedia, sink: OutputSink) -> EngineRequest:
        """Accept a request; its events go to `sink`. May wait for a schema to be compiled: not for the event loop.

        Raises:
            ContextTooLong, InvalidRequest, MediaError: It cannot be served as asked.
            CapacityError: Too many requests wait already, or the engine is draining.
        """
        self._check_room()
        if isinstance(sink, PrefillOnly):
            raise InvalidRequest("the engine vllm computes no prompt whose answer nobody wants")
        choices = self.inputs.process(params, media, sink)
        self._check_room()
        self._arrivals.append(choices)
        self.wake.set()
        return choices[0].request

    def _check_room(self) -> None:
        if self._failure:
            raise EngineError(f"the engine vllm cannot go on: {self._failure}")
        if self._is_draining:
            raise CapacityError("the server is being stopped; ask another one", 5)
        num_waiting = max(0, self._num_live + len(self._arrivals) - self.config.max_num_seqs)
        if num_waiting >= self.config.max_waiting:
            raise CapacityError(f"{num_waiting} requests are waiting already; try again shortly", 1)

    def abort(self, request: EngineRequest, *, wait: bool = False) -> None:
        """End a request. What it holds is freed at once when no step is running, and before the next step otherwise."""
        self._aborts.append(request)
        self.wake.set()
        if not request.is_finished and self._lock.acquire(blocking=wait):
            try:
                self._update()
            finally:
                self._lock.release()

    def _update(self) -> None:
        """Take in what arrived, and end what was aborted or is past its deadline."""
        aborts = [self._aborts.popleft() for _ in range(len(self._aborts))]
        for choices in [self._arrivals.popleft() for _ in range(len(self._arrivals))]:
            self._admit(choices)
        for request in aborts:
            if request in self._live:
                self._end(request)
        now = time.perf_counter()
        for request in [one for one in self._live if one.deadline is not None and now > one.deadline]:
            self._end(request, DeadlineExceeded("the request took longer than it may"))

    def _admit(self, choices: Sequence[Choice]) -> None:
        request = choices[0].request
        self._live[request] = set(choices)
        try:
            for choice in choices:
                choice.name = self._core.add(choice, request.priority)
                self._choices[choice.name] = choice
        except MmError as error:
            self._end(request, error)
        except Exception as error:
            log.exception("vLLM did not take a request: request_id=%s", request.request_id)
            self._end(request, EngineError(f"vLLM did not take the request: {type(error).__name__}"))

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> bool:
        """Compute one step. Returns whether there was anything to do."""
        with self._lock:
            return self._step()

    def step_unless(self, condition: Callable[[], bool]) -> None:
        """Compute one step, unless another thread's step has made `condition` true while this one waited for it."""
        with self._lock:
            if not condition():
                self._step()

    def _step(self) -> bool:
        start = time.perf_counter()
        self._update()
        if not self._live:
            return False
        try:
            outputs = self._core.step()
        except Exception as error:
            log.exception("a step of vLLM failed")
            self._failure = f"a step failed: {type(error).__name__}"
            self._fail_all(EngineError(f"a step of vLLM failed: {type(error).__name__}"))
            return True
        self._counters.model_s += time.perf_counter() - start
        for output in outputs:
            if (choice := self._choices.get(output.name)) is not None:
                self._take(choice, output)
        num_tokens = sum(len(output.tokens) for output in outputs)
        self._counters.record_step(num_tokens, time.perf_counter() - start)
        return True

    def _take(self, choice: Choice, output: CoreOutput) -> None:
        """Make new tokens part of a choice, and end it after the last one."""
        request, now = choice.request, time.perf_counter()
        if request.first_scheduled_time is None:
            request.first_scheduled_time = min(now, output.scheduled_time or now)
            request.num_cached_tokens = output.num_cached_tokens
        if choice.last_token_time is not None:
            for _ in output.tokens:
                self._counters.inter_token_s.observe((now - choice.last_token_time) / len(output.tokens))
        choice.last_token_time = now
        try:
            self._append(choice, output, now)
        except SchemaNotFulfilled as error:
            self._end(request, error)
        except Exception as error:
            log.exception("a choice cannot go on: request_id=%s", request.request_id)
            self._end(request, EngineError(f"a token could not be added to the answer: {type(error).__name__}"))

    def _append(self, choice: Choice, output: CoreOutput, now: float) -> None:
        request = choice.request
        for token in output.tokens:
            is_first = request.first_token_time is None
            if is_first:
                request.first_token_time = now
                request.kv_bytes = -(-request.prompt.length // self._core.block_size) * self._core.block_size
                request.kv_bytes *= self._core.token_bytes
            request.sink.put(choice.output.append(token, request.prompt.length if is_first else None))
            request.num_completion_tokens += 1
            if choice.matcher is not None and choice.matcher.is_broken:
                self._end(request, EngineError("vLLM wrote a token that the request's schema does not allow"))
                return
            if choice.output.finish_reason is not None:
                self._finish(choice, is_over_there=output.is_finished)
                return
        if output.is_finished:
            self._end(request, EngineError(f"vLLM ended the answer early: {output.reason or 'it gave no reason'}"))

    # ── how requests end ──────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, choice: Choice, *, is_over_there: bool) -> None:
        """End a choice, and its request with the last one.

        Args:
            is_over_there: vLLM has ended it already.
        """
        request = choice.request
        if not is_over_there:
            self._core.abort([choice.name])
        self._choices.pop(choice.name, None)
        self._live[request].discard(choice)
        request.num_unfinished -= 1
        if request.num_unfinished:
            return
        for key, length in request.named_lengths().items():
            self._hold(key, length)
        request.sink.put(summarise(request, time.perf_counter()))
        self._end(request)

    def _end(self, request: EngineRequest, error: BaseException | None = None) -> None:
        """End a request's events and what vLLM holds of it. A sink that fails affects nobody else."""
        choices = self._live.pop(request, set[Choice]())
        request.is_finished = True
        if names := [choice.name for choice in choices if choice.name]:
            with contextlib.suppress(Exception):  # it may be vLLM that failed
                self._core.abort(names)
        for name in names:
            self._choices.pop(name, None)
        try:
            request.sink.end(error)
        except Exception:
            log.exception("an end was not taken: request_id=%s", request.request_id)

    def fail_all(self, error: MmError) -> None:
        """End all requests with an error."""
        with self._lock:
            self._update()
            self._fail_all(error)

    def _fail_all(self, error: MmError) -> None:
        for request in list(self._live):
            self._end(request, error)

    def drain(self) -> None:
        """Refuse new requests. Those that were accepted are completed."""
        self._is_draining = True

    def close(self) -> None:
        """Stop vLLM, and the threads that compile schemas."""
        self.inputs.close()
        with self._lock:
            self._core.close()

    # ── what it says of itself ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def text_limits(self) -> TextLimits:
        """How long the text of a conversation may be."""
        return self.family.text_limits

    @property
    def has_work(self) -> bool:
        """Whether a request is left."""
        return bool(self._live or self._arrivals)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the engine has to be replaced: vLLM does not go on after a step that failed."""
        return (f"vLLM: {self._failure}",) if self._failure else ()

    @property
    def prefills_ahead(self) -> bool:
        """Never: vLLM computes prompts together with their answers."""
        return False

    @property
    def held_prefixes(self) -> dict[str, int]:
        """Beginnings of prompts that were computed last, as many as its cache holds: vLLM does not say which it has."""
        return dict(self._held)

    def _hold(self, key: str, length: int) -> None:
        """Note what was computed, and forget the oldest that the cache has no room for."""
        self._held[key] = length
        self._held.move_to_end(key)
        room = self._core.kv_bytes // max(1, self._core.token_bytes)
        while len(self._held) > MAX_HELD or (len(self._held) > 1 and sum(self._held.values()) > room):
            self._held.popitem(last=False)

    @property
    def _num_live(self) -> int:
        return len(self._choices)

    @property
    def stats(self) -> EngineStats:
        """What the engine holds now and has done so far. May be read from any thread."""
        said, counters, spec = self._core.stats, self._counters, SpecDecodeStats()
        spec.num_drafts, spec.num_draft_tokens = said.num_drafts, said.num_draft_tokens
        spec.num_accepted_tokens = said.num_accepted_tokens
        num_live = self._num_live
        num_running = min(said.num_running, num_live)
        return EngineStats(
            engine_id=self.engine_id,
            num_running=num_running,
            num_waiting=num_live - num_running + sum(len(choices) for choices in list(self._arrivals)),
            num_waiting_tokens=sum(choices[0].request.prompt.length for choices in list(self._arrivals)),
            kv_used_bytes=round(said.kv_usage * self._core.kv_bytes),
            kv_total_bytes=self._core.kv_bytes,
            kv_prefix_bytes=0,
            kv_idle_bytes=0,
            num_preemptions=said.num_preemptions,
            prefix_queries=said.prefix_queries,
            prefix_hits=said.prefix_hits,
            num_steps=counters.num_steps,
            num_scheduled_tokens=said.num_prompt_tokens + counters.num_scheduled_tokens,
            step_s=counters.step_s,
            model_s=counters.model_s,
            step_tokens=counters.step_tokens.copy(),
            inter_token_s=counters.inter_token_s.copy(),
            spec_decode=spec,
        )


MAX_HELD = 256
"""How many beginnings of prompts are published at most."""
