"""The one pump of an engine and the one output queue of a request.

Something has to call an engine's `step` again and again. `EngineLoop` does, in one of two ways:

- `start` runs the engine in a thread of its own: a server, or a job that encodes while it decodes.
- Without that thread, whoever reads a request's events synchronously runs the engine while it waits.

Either way a request's events go through an `OutputQueue`, which has a synchronous and an asynchronous reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from mm.data.outputs import Event
from mm.data.request import Request, SpeculationOptions
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import EncodedMedia, ItemCount
from mm.engine.interface import DecoderEngine, HandingEngine
from mm.engine.kv_transfer.messages import HandOff, KVPiece, ReceivedKV
from mm.engine.output_queue import HandOffQueue, OutputQueue, Queue
from mm.engine.sequence import EngineRequest, PrefillOnly
from mm.engine.stats import EngineStats
from mm.errors import CapacityError, EngineError
from mm.plugins.calls import StageStatus
from mm.plugins.reducer import Stage
from mm.plugins.spec import reducer_spec

log = logging.getLogger(__name__)
T = TypeVar("T")
Q = TypeVar("Q", bound=Queue[Any])

IDLE_S = 0.5
"""How often an idle engine looks for requests that are past their deadline."""
IN_DECODER = frozenset({Stage.IN_PREFILL, Stage.IN_DECODE, Stage.PER_TOKEN})
"""Where reducers decide by the question, or drop generated tokens: then requests share no visual tokens."""

NUM_SUBMIT_THREADS = 2
"""Requests that are prepared at a time: chat template, splice, schema."""


@dataclass(frozen=True)
class Submitted:
    """A request in the engine.

    Attributes:
        queue: Its events.
        changed: Set after each event, where a thread of the loop runs the engine.
    """

    request: EngineRequest
    queue: OutputQueue
    changed: threading.Event


class EngineLoop:
    """Runs an engine and hands out the events of its requests. Safe to use from several threads.

    Args:
        num_threads: CPU threads of torch in each of the loop's threads; None leaves torch's own choice.
    """

    def __init__(self, engine: DecoderEngine, *, num_threads: int | None = None) -> None:
        self._engine, self._num_threads = engine, num_threads
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._step_started: float | None = None
        self._submit_pool: ThreadPoolExecutor | None = None

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def hands_over(self) -> bool:
        """Whether requests may begin here and go on at another engine, or the other way round."""
        return self._engine.capabilities.hands_over

    @property
    def held_prefixes(self) -> dict[str, int]:
        return self._engine.held_prefixes

    def start(self) -> None:
        """Run the engine in a thread of its own until `close`."""
        set_threads = functools.partial(_set_num_threads, self._num_threads)
        self._submit_pool = ThreadPoolExecutor(NUM_SUBMIT_THREADS, thread_name_prefix="submit", initializer=set_threads)
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _set_num_threads(self._num_threads)
        while not self._closed.is_set():
            self._engine.wake.clear()
            self._step_started = time.monotonic()
            try:
                has_worked = self._engine.step()
            except BaseException as error:  # whatever it is, the thread goes on: nobody else runs the engine
                log.critical("a step failed outside of its requests", exc_info=error)
                self._engine.fail_all(EngineError(f"the decoder failed: {type(error).__name__}"))
                has_worked = False
            self._step_started = None
            if not has_worked and not self._closed.is_set():
                self._engine.wake.wait(IDLE_S)

    def status(self) -> StageStatus:
        """Whether the engine does its work, and which plugins are switched off. May be called from any thread."""
        status, started = self._engine.calls.status(), self._step_started
        problems = [*status.problems, *self._engine.problems]
        age_s = 0.0 if started is None else time.monotonic() - started
        if age_s > self._engine.calls.limits.stall_timeout_s:
            problems.append(f"a step of the decoder has not ended for {age_s:.0f} s")
        if self._thread is not None and not self._thread.is_alive() and not self._closed.is_set():
            problems.append("the thread that runs the decoder has ended")
        return replace(status, problems=tuple(problems))

    # ── step by step, by the caller ───────────────────────────────────────────────────────────────────────────────────

    def submit(self, params: Request, media: EncodedMedia) -> Submitted:
        """Hand a request to the engine. Its events are read with `read`, or from its queue while `step` is called.

        Raises:
            MmError: The request cannot be served.
        """
        changed = threading.Event()
        queue = OutputQueue(changed.set if self._thread is not None else None)
        return Submitted(self._engine.submit(params, media, queue), queue, changed)

    def prefill(self, params: Request, media: EncodedMedia) -> bool:
        """Let the loop compute the prompt up to its last visual token, for a request that is still being encoded.

        The request finds the blocks in the prefix cache afterwards, if its prompt begins in the same way.

        Args:
            media: The encoded media as far as they are certain.

        Returns:
            Whether it was accepted. It is not where requests share no visual tokens, without a prefix cache, without a
            thread of the loop, and when too many requests wait.

        Raises:
            ContextTooLong, InvalidRequest: The request cannot be served as asked.
        """
        stages = {*reducer_spec(media.reducer).capabilities.stages}
        if self._thread is None or not self._engine.prefills_ahead or stages & IN_DECODER:
            return False
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
        asked = replace(params, sampling=sampling, speculation=SpeculationOptions(drafter="none"))
        try:
            self._engine.submit(asked, media, PrefillOnly())
        except CapacityError:
            return False
        return True

    def step(self) -> bool:
        """Compute one step in this thread. Returns whether there was anything to do."""
        return self._engine.step()

    def abort(self, submitted: Submitted) -> None:
        """End a request and free what it holds."""
        self._engine.abort(submitted.request, wait=self._thread is None)

    # ── synchronous reader ────────────────────────────────────────────────────────────────────────────────────────────

    def stream_sync(self, params: Request, media: EncodedMedia) -> Generator[Event]:
        """A request's events. Closing the generator aborts the request and frees what it holds.

        Raises:
            MmError: The request cannot be served; before the first event.
        """
        yield from self.read(self.submit(params, media))

    def read(self, submitted: Submitted) -> Generator[Event]:
        """The events of a submitted request, as `stream_sync`."""
        queue = submitted.queue
        try:
            while True:
                has_ended = queue.has_ended
                yield from queue.take()
                if has_ended:
                    break
                self._wait_for(submitted)
            queue.raise_error()
        finally:
            self.abort(submitted)

    def _wait_for(self, submitted: Submitted) -> None:
        """Wait for an event, or run a step when no thread does and nothing has come meanwhile."""
        if self._thread is None:
            self._engine.step_unless(lambda: not submitted.queue.is_empty)
        else:
            submitted.changed.wait()
            submitted.changed.clear()

    # ── asynchronous reader ───────────────────────────────────────────────────────────────────────────────────────────

    async def check_length(self, params: Request) -> None:
        """Refuse a request whose text alone is too long, before its media are encoded.

        Raises:
            ContextTooLong, InvalidRequest: As `stream`.
        """
        await self._aside(self._engine.inputs.check_length, params)

    async def prompt_length(self, params: Request, items: Sequence[ItemCount]) -> int:
        """Tokens of the prompt of a request, given how many its items have.

        Raises:
            ContextTooLong, InvalidRequest: As `stream`.
        """
        return await self._aside(self._engine.inputs.prompt_length, params, items)

    async def token_ids(self, params: Request) -> list[int]:
        """As `InputProcessor.token_ids`."""
        return await self._aside(self._engine.inputs.token_ids, params)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """As `InputProcessor.text_of`."""
        return await self._aside(self._engine.inputs.text_of, token_ids)

    async def _aside(self, function: Callable[..., T], *args: object) -> T:
        """The result of a quick function, computed in a thread beside that of the engine."""
        assert self._submit_pool is not None, "start the loop first"
        work = functools.partial(function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._submit_pool, work)

    async def stream(self, params: Request, media: EncodedMedia | ReceivedKV) -> AsyncGenerator[list[Event]]:
        """A request's events as they come, several at a time where they came together.

        Closing the generator, or cancelling its task, frees what the request holds within one step.

        Args:
            media: With what another engine has computed of the request, if one has.
        """
        queue, batches = self._batches(OutputQueue)
        async with self._submitted(params, media, queue):
            async for events in batches:
                yield events

    async def hand_over(self, params: Request, media: EncodedMedia) -> AsyncGenerator[list[Event | KVPiece | HandOff]]:
        """The first tokens of a request and what another engine needs to go on, as they come.

        Closing the generator says that the other engine has it: the blocks are freed.
        """
        queue, batches = self._batches(HandOffQueue)
        async with self._submitted(params, media, queue):
            async for batch in batches:
                yield batch

    def _batches(self, kind: Callable[[Callable[[], None]], Q]) -> tuple[Q, AsyncGenerator[list[Any]]]:
        """A queue, and what is put into it, on this event loop."""
        ready, loop = asyncio.Event(), asyncio.get_running_loop()
        queue = kind(functools.partial(_call_soon, loop, ready.set))

        async def batches() -> AsyncGenerator[list[Any]]:
            while True:
                await ready.wait()
                ready.clear()
                has_ended = queue.has_ended
                if batch := queue.take():
                    yield batch
                if has_ended:
                    queue.raise_error()
                    return

        return queue, batches()

    async def complete(self, params: Request, media: EncodedMedia) -> list[Event]:
        """All events of a request. The event loop is woken once, at the end."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_change() -> None:
            if queue.has_ended:
                _call_soon(loop, done.set)

        queue = OutputQueue(on_change)
        async with self._submitted(params, media, queue):
            await done.wait()
            queue.raise_error()
            return queue.take()

    @contextlib.asynccontextmanager
    async def _submitted(
        self, params: Request, media: EncodedMedia | ReceivedKV, queue: OutputQueue | HandOffQueue
    ) -> AsyncGenerator[None]:
        """Submit in another thread, since compiling a schema may take seconds; abort on leaving."""
        assert self._submit_pool is not None, "start the loop first"
        submit = functools.partial(cast(HandingEngine, self._engine).submit, params, media, queue)
        work = asyncio.get_running_loop().run_in_executor(self._submit_pool, submit)
        try:
            request = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(self._abort_submitted)
            raise
        finally:
            del work, submit  # else an error would hold itself through its traceback, and with it the request
        try:
            yield
        finally:
            self._engine.abort(request)

    def _abort_submitted(self, work: asyncio.Future[EngineRequest]) -> None:
        if not work.cancelled() and work.exception() is None:
            self._engine.abort(work.result())

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def drain(self) -> None:
        """Refuse new requests from now on. Those that were accepted are completed."""
        self._engine.drain()

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._engine.has_work

    def close(self) -> None:
        """Stop. Requests that are not finished get no more events."""
        self._closed.set()
        self._engine.wake.set()
        if self._submit_pool is not None:
            self._submit_pool.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        self._engine.close()


def _set_num_threads(num_threads: int | None) -> None:
    """torch keeps the count per thread, since OpenMP does."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody reads any more
        loop.call_soon_threadsafe(callback)
