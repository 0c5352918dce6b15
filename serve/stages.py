"""The encoder's plain function and the engine, put into threads: a replica holds one of the two, a process without Ray
both.

Nothing here knows HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from mm.build import build_encode_parts, build_engine
from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded
from mm.encode.pipeline import encode
from mm.engine.sequence import EngineRequest, OutputSink
from mm.engine.stats import EngineStats
from mm.media import prepare_decoder
from mm.plugins.spec import build_reducer
from serve.config import ServeConfig
from serve.runtime import Features, Load, LocalRuntime, default_reducer


def _pool(name: str, workers: int, num_threads: int | None) -> ThreadPoolExecutor:
    """Threads that compute. torch's thread count is set in each, since OpenMP keeps one per thread."""
    set_threads = (lambda: None) if num_threads is None else lambda: torch.set_num_threads(num_threads)
    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=set_threads)


class EncoderStage:
    """Encodes in threads.

    Args:
        encode: The encoder's half of a request's journey.
        kinds: Media it takes.
        workers: Requests it works on at a time.
    """

    def __init__(
        self,
        encode: Callable[[Request], Features],
        kinds: Iterable[str],
        *,
        workers: int = 2,
        num_threads: int | None = None,
    ) -> None:
        self.kinds = tuple(sorted(kinds))
        self._encode = encode
        self._pool = _pool("encode", workers, num_threads)

    async def encode(self, request: Request) -> Features:
        """The encoded items as they are. Cancelling drops a request that waits; what a running one makes is cached."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, request)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Feed:
    """Events on their way from a worker thread to one consumer on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._events: deque[Event] = deque()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        self._error, self._ended = error, True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._ready.set)

    async def batches(self) -> AsyncGenerator[list[Event]]:
        while True:
            await self._ready.wait()
            self._ready.clear()
            ended = self._ended
            batch = [self._events.popleft() for _ in range(len(self._events))]
            if batch:
                yield batch
            if ended:
                if self._error is not None:
                    raise self._error
                return


class _Collected:
    """All events of a request, for one who waits for the last."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()

    def put(self, event: Event) -> None:
        self.events.append(event)

    def end(self, error: BaseException | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: BaseException | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    async def wait(self) -> list[Event]:
        await self._done
        return self.events


class DecoderHalfOf(Protocol):
    """What a decoder stage asks of an engine."""

    wake: threading.Event

    @property
    def has_work(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(
        self, request: Request, encoded: Sequence[Encoded], sink: OutputSink, reducer: Any, spec: str
    ) -> EngineRequest: ...

    def cancel(self, job: EngineRequest) -> None: ...

    def step(self) -> bool: ...

    def close(self) -> None: ...


class DecoderStage:
    """Runs the engine in a thread of its own; requests are prepared in another, never on the event loop."""

    def __init__(self, engine: DecoderHalfOf, max_context_tokens: int, *, num_threads: int | None = None) -> None:
        self.max_context_tokens = max_context_tokens
        self._engine = engine
        self._prepare = _pool("prepare", 2, num_threads)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(num_threads,), name="decode", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        stats = self._engine.stats
        return Load(num_running=stats.num_running, num_waiting=stats.num_waiting, engines=(stats,))

    async def stream(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> AsyncGenerator[list[Event]]:
        """Events, coalesced. Closing it, or cancelling its task, frees everything within one pass."""
        feed = _Feed()
        async with self._submitted(request, encoded, reducer, feed):
            async for batch in feed.batches():
                yield batch

    async def complete(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> list[Event]:
        """All events, without a wake-up per token."""
        collected = _Collected()
        async with self._submitted(request, encoded, reducer, collected):
            return await collected.wait()

    @contextlib.asynccontextmanager
    async def _submitted(
        self, request: Request, encoded: Sequence[Encoded], reducer: str, sink: OutputSink
    ) -> AsyncIterator[None]:
        submit = functools.partial(self._engine.submit, request, encoded, sink, build_reducer(reducer), reducer)
        work = asyncio.get_running_loop().run_in_executor(self._prepare, submit)
        try:
            job = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(self._cancel_submitted)
            raise
        try:
            yield
        finally:
            self._engine.cancel(job)

    def _cancel_submitted(self, work: asyncio.Future[EngineRequest]) -> None:
        if not work.cancelled() and work.exception() is None:
            self._engine.cancel(work.result())

    def _run(self, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        while not self._closed.is_set():
            self._engine.wake.clear()
            if not self._engine.step() and not self._closed.is_set():
                self._engine.wake.wait(IDLE_S)

    def close(self) -> None:
        """Stop; requests that are here get no more events."""
        self._closed.set()
        self._engine.wake.set()
        self._prepare.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        self._engine.close()


IDLE_S = 0.5
"""How often an idle engine looks for requests past their deadline."""


def build_encoder_stage(config: ServeConfig) -> EncoderStage:
    """Load tower and projector."""
    model = config.with_threads().model
    parts = build_encode_parts(model)
    if "video" in parts.encoder.kinds:
        prepare_decoder(model.video_decoder)  # the first clip finds it started, a missing package is told now

    def encode_request(request: Request) -> Features:
        media = encode(request, parts)
        return Features(
            encoded=media.items,
            reducer=media.reducer,
            num_items=media.num_items,
            num_cache_hits=media.num_cache_hits,
        )

    return EncoderStage(
        encode_request, parts.encoder.kinds, workers=config.encode_workers, num_threads=model.num_threads
    )


def build_decoder_stage(config: ServeConfig) -> DecoderStage:
    """Load the language model."""
    model = config.with_threads().model
    engine = build_engine(model)
    return DecoderStage(engine, engine.family.max_context_tokens, num_threads=model.num_threads)


def build_local_runtime(config: ServeConfig) -> LocalRuntime:
    """Load both halves into this process.

    Raises:
        MmError: The model or its default reducer cannot be used.
    """
    return LocalRuntime(build_encoder_stage(config), build_decoder_stage(config), default_reducer(config))
