"""The two halves of a request, each in threads of its own: a Ray replica holds one of them, a process without Ray both.

Nothing here knows HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from mm.build import build_encode_parts, build_engine
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.encode.pipeline import encode
from mm.engine.loop import EngineLoop
from mm.media import prepare_decoder
from serve.config import ServeConfig
from serve.runtime import LocalRuntime, default_reducer


class EncoderStage:
    """Encodes in threads.

    Args:
        encode: The encoder's half of a request.
        kinds: Kinds of media that it takes.
        workers: Requests that it works on at a time.
        num_threads: CPU threads of torch in each worker; None leaves torch's own choice.
    """

    def __init__(
        self,
        encode: Callable[[Request], EncodedMedia],
        kinds: Iterable[str],
        *,
        workers: int = 2,
        num_threads: int | None = None,
    ) -> None:
        self.kinds = tuple(sorted(kinds))
        self._encode = encode
        set_threads = None if num_threads is None else functools.partial(torch.set_num_threads, num_threads)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode", initializer=set_threads)

    async def encode(self, request: Request) -> EncodedMedia:
        """The request's encoded media.

        Cancelling drops a request that waits for a worker. What a running worker computes is cached.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, request)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def build_encoder_stage(config: ServeConfig) -> EncoderStage:
    """Load tower and projector."""
    model = config.with_threads().model
    parts = build_encode_parts(model)
    if "video" in parts.encoder.kinds:
        prepare_decoder(model.video_decoder)  # a missing package is an error now, and the first clip need not wait
    return EncoderStage(
        functools.partial(encode, parts=parts),
        parts.encoder.kinds,
        workers=config.encode_workers,
        num_threads=model.num_threads,
    )


def build_decoder_loop(config: ServeConfig) -> tuple[EngineLoop, int]:
    """Load the language model and start its engine. Returns the loop and the positions of the model."""
    model = config.with_threads().model
    engine = build_engine(model)
    loop = EngineLoop(engine, num_threads=model.num_threads)
    loop.start()
    return loop, engine.family.max_context_tokens


def build_local_runtime(config: ServeConfig) -> LocalRuntime:
    """Load both halves into this process.

    Raises:
        MmError: The model or its default reducer cannot be used.
    """
    encoder = build_encoder_stage(config)
    loop, max_context_tokens = build_decoder_loop(config)
    return LocalRuntime(encoder, loop, max_context_tokens=max_context_tokens, default_reducer=default_reducer(config))
