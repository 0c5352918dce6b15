"""The two halves of a request, each in threads of its own: a Ray replica holds one of them, a process without Ray both.

Nothing here knows HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from mm.build import build_decoder, build_encode_parts
from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia, ItemCount
from mm.encode.clip_stream import ClipProgress, OnProgress
from mm.encode.counting import count_tokens
from mm.encode.loaded import LoadedMedia
from mm.encode.pipeline import encode_loaded, load
from mm.engine.loop import EngineLoop
from mm.errors import InvalidRequest
from mm.media import is_remote, prepare_decoder
from mm.plugins.calls import StageStatus
from mm.plugins.threads import while_slow
from serve.config import ServeConfig
from serve.runtime import LocalRuntime, default_reducer

L = TypeVar("L")
"""Loaded media, on their way from `load` to `encode`."""

MAX_DOWNLOADS = 16
"""Requests that may wait for remote media beside those that compute."""


def _counts_nothing(request: Request) -> tuple[ItemCount, ...]:
    raise InvalidRequest("this encoder cannot count tokens")


class EncoderStage(Generic[L]):
    """Encodes in threads.

    A request whose reducer is slow does not count as computing any more, so it keeps no other request waiting.

    Args:
        load: Fetches and decodes the media of a request.
        encode: Runs the tower and the reducer on them, and says how far a long clip is.
        kinds: Kinds of media that it takes.
        workers: Requests that compute at a time.
        num_threads: CPU threads of torch in each worker; None leaves torch's own choice.
        count: Counts the visual tokens of a request.
        status: How the plugins do.
    """

    def __init__(
        self,
        load: Callable[[Request], L],
        encode: Callable[[L, OnProgress], EncodedMedia],
        kinds: Iterable[str],
        *,
        workers: int = 2,
        num_threads: int | None = None,
        count: Callable[[Request], tuple[ItemCount, ...]] = _counts_nothing,
        status: Callable[[], StageStatus] = StageStatus,
    ) -> None:
        self.status = status
        self.kinds = tuple(sorted(kinds))
        self._load, self._encode, self._count = load, encode, count
        set_threads = None if num_threads is None else functools.partial(torch.set_num_threads, num_threads)
        self._pool = ThreadPoolExecutor(workers + MAX_DOWNLOADS, thread_name_prefix="encode", initializer=set_threads)
        self._may_compute = threading.Semaphore(workers)

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> EncodedMedia:
        """The request's encoded media, computed in one thread.

        Cancelling drops a request that does not compute yet, and ends one that takes a clip chunk by chunk. What else
        is being computed is cached.

        Args:
            on_progress: Told in the thread that computes. What it raises ends the request.
        """
        is_cancelled = threading.Event()

        def tell(progress: ClipProgress) -> None:
            if is_cancelled.is_set():
                raise CancelledError
            if on_progress is not None:
                on_progress(progress)

        work = asyncio.get_running_loop().run_in_executor(self._pool, self._run, request, is_cancelled, tell)
        try:
            return await work
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    async def count(self, request: Request) -> tuple[ItemCount, ...]:
        """The visual tokens that the request's items will have. Its media are loaded, and no tower runs."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._count_in_turn, request)

    def _count_in_turn(self, request: Request) -> tuple[ItemCount, ...]:
        with self._computing():
            return self._count(request)

    def _run(self, request: Request, is_cancelled: threading.Event, tell: OnProgress) -> EncodedMedia:
        """Load and encode. A download may take seconds, so it does not count as computing."""
        loaded = self._load(request) if any(is_remote(item) for item in request.media) else None
        with self._computing():
            if is_cancelled.is_set():
                raise CancelledError
            return self._encode(self._load(request) if loaded is None else loaded, tell)

    @contextlib.contextmanager
    def _computing(self) -> Generator[None]:
        """Hold one of the places for requests that compute, until a plugin turns out to be slow."""
        held = [self._may_compute]

        def give_back() -> None:
            while held:
                held.pop().release()

        self._may_compute.acquire()
        try:
            with while_slow(give_back):
                yield
        finally:
            give_back()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def build_encoder_stage(config: ServeConfig) -> EncoderStage[LoadedMedia]:
    """Load tower and projector."""
    model = config.with_threads().model
    # Over HTTP nobody may name a path of this machine, whatever the policy allows elsewhere.
    parts = build_encode_parts(replace(model, sources=replace(model.sources, allow_paths=False)))
    if "video" in parts.encoder.kinds:
        prepare_decoder()  # a missing package is an error now, and the first clip need not wait
    return EncoderStage(
        functools.partial(load, parts=parts),
        lambda loaded, tell: encode_loaded(loaded, parts, tell),
        parts.encoder.kinds,
        workers=config.encode_workers,
        num_threads=model.num_threads,
        count=functools.partial(count_tokens, parts=parts),
        status=parts.calls.status,
    )


def build_decoder_loop(config: ServeConfig) -> tuple[EngineLoop, TextLimits]:
    """Load the language model and start its engine. Returns the loop, and how long texts may be."""
    model = config.with_threads().model
    engine = build_decoder(model)
    loop = EngineLoop(engine, num_threads=model.num_threads)
    loop.start()
    return loop, engine.text_limits


def build_whole(config: ServeConfig) -> tuple[LocalRuntime, EngineLoop, TextLimits]:
    """Load both halves into this process. Returns them, the decoder's loop, and how long texts may be.

    Raises:
        MmError: The model or its default reducer cannot be used.
    """
    encoder = build_encoder_stage(config)
    loop, limits = build_decoder_loop(config)
    reducer, num_places = default_reducer(config), config.max_ongoing_requests
    runtime = LocalRuntime(encoder, loop, limits=limits, default_reducer=reducer, num_places=num_places)
    return runtime, loop, limits


def build_local_runtime(config: ServeConfig) -> LocalRuntime:
    """Both halves in this process, as `build_whole`."""
    return build_whole(config)[0]
