"""The engine's two plain functions, put into threads: a replica holds one of the two, a process without Ray both.

Nothing here knows HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import cast

import torch

from mm.api import build_decoder, build_encode_parts
from mm.core.data import Encoded, Event, Request, Summary
from mm.core.plugins import canonical_spec
from mm.engine.generate import answer, encode, resolve_reducer
from mm.media import prepare_decoder
from serve.config import ServeConfig
from serve.runtime import Features, Load, LocalRuntime, default_reducer

Answer = Callable[[Request, Sequence[Encoded], str], Generator[Event]]
"""The decoder's half of a request's journey; the text says how its media were reduced. Closing it frees everything."""


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
        self.cancelled = threading.Event()
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


class DecoderStage:
    """Answers one request at a time in a thread of its own; the others wait in order, and leave when cancelled."""

    def __init__(self, answer: Answer, max_context_tokens: int, *, num_threads: int | None = None) -> None:
        self.max_context_tokens = max_context_tokens
        self._answer = answer
        self._pool = _pool("decode", 1, num_threads)
        self._num_submitted = 0
        self._num_started = 0
        self._num_ended = 0

    @property
    def load(self) -> Load:
        return Load(
            num_running=self._num_started - self._num_ended, num_waiting=self._num_submitted - self._num_started
        )

    async def stream(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> AsyncGenerator[list[Event]]:
        """Events, coalesced. Closing it, or cancelling its task, ends the work within one token."""
        feed = _Feed()
        job = self._submit(request, encoded, reducer, feed.put, feed.cancelled)
        job.add_done_callback(lambda done: feed.end(None if done.cancelled() else done.exception()))
        try:
            async for batch in feed.batches():
                yield batch
        finally:
            feed.cancelled.set()
            job.cancel()

    async def complete(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> list[Event]:
        """All events, without a wake-up per token."""
        events: list[Event] = []
        cancelled = threading.Event()
        try:
            await self._submit(request, encoded, reducer, events.append, cancelled)
        finally:
            cancelled.set()
        return events

    def _submit(
        self,
        request: Request,
        encoded: Sequence[Encoded],
        reducer: str,
        put: Callable[[Event], None],
        cancelled: threading.Event,
    ) -> asyncio.Future[None]:
        arrived = time.perf_counter()
        begun = False

        def work() -> None:
            nonlocal begun
            begun = True
            self._num_started += 1
            try:
                waited_s = time.perf_counter() - arrived
                for event in self._events(request, encoded, reducer, cancelled):
                    put(_with_wait(event, waited_s))
            finally:
                self._num_ended += 1

        def left(done: asyncio.Future[None]) -> None:
            if not begun and done.cancelled():
                self._num_submitted -= 1

        self._num_submitted += 1
        job = asyncio.get_running_loop().run_in_executor(self._pool, work)
        job.add_done_callback(left)
        return job

    def _events(
        self, request: Request, encoded: Sequence[Encoded], reducer: str, cancelled: threading.Event
    ) -> Iterator[Event]:
        if cancelled.is_set():
            return
        # Closed in the thread that runs it: it holds the decoder's lock and its cache.
        with contextlib.closing(self._answer(request, encoded, reducer)) as events:
            for event in events:
                if cancelled.is_set():
                    return
                yield event

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _with_wait(event: Event, waited_s: float) -> Event:
    """The time in line here counts as queueing too."""
    if not isinstance(event, Summary):
        return event
    return replace(event, timings=replace(event.timings, queue_s=event.timings.queue_s + waited_s))


def build_encoder_stage(config: ServeConfig) -> EncoderStage:
    """Load tower and projector."""
    model = config.with_threads().model
    parts = build_encode_parts(model)
    if "video" in parts.encoder.kinds:
        prepare_decoder(model.video_decoder)  # the first clip finds it started, a missing package is told now

    def encode_request(request: Request) -> Features:
        reducer = canonical_spec(resolve_reducer(request.vision, parts))
        encoded = encode(request, parts)
        hits = sum(item.cache_hit for item in encoded)
        return Features(encoded=encoded, reducer=reducer, num_items=len(encoded), num_cache_hits=hits)

    return EncoderStage(
        encode_request, parts.encoder.kinds, workers=config.encode_workers, num_threads=model.num_threads
    )


def build_decoder_stage(config: ServeConfig) -> DecoderStage:
    """Load the language model."""
    model = config.with_threads().model
    decoder = build_decoder(model)

    def answer_request(request: Request, encoded: Sequence[Encoded], reducer: str) -> Generator[Event]:
        return cast("Generator[Event]", answer(request, encoded, decoder, reducer=reducer))

    return DecoderStage(answer_request, decoder.family.max_context_tokens, num_threads=model.num_threads)


def build_local_runtime(config: ServeConfig) -> LocalRuntime:
    """Load both halves into this process.

    Raises:
        MmError: The model or its default reducer cannot be used.
    """
    return LocalRuntime(build_encoder_stage(config), build_decoder_stage(config), default_reducer(config))
