"""Where a request's two halves run: in this process, or in Ray replicas.

What HTTP needs of either is the `Runtime` protocol. Nothing here knows HTTP, and Ray is imported only where its errors
are read. The halves themselves are `serve.stages`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import Encoded
from mm.engine.stats import EngineStats
from mm.errors import CapacityError
from mm.plugins.spec import reducer_spec
from serve.config import ServeConfig

INLINE_BYTES = 1024 * 1024
"""Smaller features travel inside the message: a round trip to the object store costs more than copying them twice."""


class Unavailable(CapacityError):
    """A replica went away, or none is ready yet."""

    code = "unavailable"


class FeaturesLost(Unavailable):
    """The encoder's output is gone, because the replica that made it is."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """A request's encoded media, as a runtime hands them from `encode` to `stream`.

    Attributes:
        encoded: The items, or where a replica finds them. Only the runtime that made it can read it.
        reducer: Canonical specification of how they were reduced.
        num_items, num_cache_hits: Media items, and how many of them the encoder already had.
        num_bytes: Size of the items, where they have to travel.
    """

    encoded: Any
    reducer: str
    num_items: int = 0
    num_cache_hits: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What clients may know about the loaded model."""

    kinds: tuple[str, ...]
    max_context_tokens: int
    default_reducer: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """Answers in the decoders: being decoded, and waiting their turn.

    Attributes:
        engines: Every decoder's own figures.
    """

    num_running: int
    num_waiting: int
    engines: tuple[EngineStats, ...] = ()


class Runtime(Protocol):
    """What the HTTP layer asks of the machinery below it."""

    async def encode(self, request: Request) -> Features:
        """Encode and reduce the request's media; also checks the reducer it names."""
        ...

    def stream(self, request: Request, features: Features) -> AsyncGenerator[list[Event]]:
        """Events as they come: the first at once, then whatever is ready. Close it to cancel."""
        ...

    async def complete(self, request: Request, features: Features) -> list[Event]:
        """All events. Cancel the task to cancel the request."""
        ...

    async def info(self) -> ModelInfo: ...

    async def load(self) -> Load: ...

    async def healthy(self) -> bool:
        """Whether a request could be answered now. Never generates."""
        ...


def needs_encoder(request: Request) -> bool:
    """Whether the encoder has anything to do: media to encode, or a reducer to check."""
    return bool(request.media) or request.vision.reducer is not None or request.vision.keep_ratio is not None


def default_reducer(config: ServeConfig) -> str:
    return reducer_spec(config.model.reducer).canonical


class EncoderHalf(Protocol):
    """What `LocalRuntime` asks of an encoder stage."""

    kinds: tuple[str, ...]

    async def encode(self, request: Request) -> Features: ...

    def close(self) -> None: ...


class DecoderHalf(Protocol):
    """What `LocalRuntime` asks of a decoder stage."""

    max_context_tokens: int

    @property
    def load(self) -> Load: ...

    def stream(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> AsyncGenerator[list[Event]]: ...

    async def complete(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> list[Event]: ...

    def close(self) -> None: ...


class LocalRuntime:
    """Both halves in this process."""

    def __init__(self, encoder: EncoderHalf, decoder: DecoderHalf, default_reducer: str) -> None:
        self._encoder, self._decoder, self._default_reducer = encoder, decoder, default_reducer

    async def encode(self, request: Request) -> Features:
        if not needs_encoder(request):
            return Features(encoded=(), reducer=self._default_reducer)
        return await self._encoder.encode(request)

    def stream(self, request: Request, features: Features) -> AsyncGenerator[list[Event]]:
        return self._decoder.stream(request, features.encoded, features.reducer)

    async def complete(self, request: Request, features: Features) -> list[Event]:
        return await self._decoder.complete(request, features.encoded, features.reducer)

    async def info(self) -> ModelInfo:
        return ModelInfo(
            kinds=self._encoder.kinds,
            max_context_tokens=self._decoder.max_context_tokens,
            default_reducer=self._default_reducer,
        )

    async def load(self) -> Load:
        return self._decoder.load

    async def healthy(self) -> bool:
        return True

    def close(self) -> None:
        """Stop taking work; what runs ends on its own."""
        self._encoder.close()
        self._decoder.close()


class RayRuntime:
    """Both halves in Ray Serve replicas, reached through handles.

    The caller keeps the request with its media, so a lost encoder costs one more encoding and not the request.

    Args:
        encoder, decoder: Handles of the `Encoder` and `Decoder` deployments.
        is_healthy: Whether both have a running replica.
    """

    def __init__(
        self, encoder: Any, decoder: Any, default_reducer: str, is_healthy: Callable[[], Awaitable[bool]]
    ) -> None:
        # Object references are only counted, and so kept alive, on calls that go through Ray itself.
        self._encode_by_reference = encoder.options(_by_reference=True).encode
        self._item_bytes: dict[str, int] = {}
        self._by_reference = decoder.options(_by_reference=True)
        self._encoder, self._decoder = encoder, decoder
        self._default_reducer = default_reducer
        self._is_healthy = is_healthy
        self._info: ModelInfo | None = None

    async def encode(self, request: Request) -> Features:
        if not needs_encoder(request):
            return Features(encoded={"items": ()}, reducer=self._default_reducer)
        try:
            features = await _result(self._encode_for(request).remote(request))
        except Unavailable:
            features = await _result(self._encode_for(request).remote(request))
        if features.num_items:
            size = features.num_bytes // features.num_items
            for kind in {item.kind for item in request.media}:
                self._item_bytes[kind] = max(size, self._item_bytes.get(kind, 0))
        return features

    def _encode_for(self, request: Request) -> Any:
        """The way that suits what will travel: sizes of features are learned from earlier answers."""
        features = sum(self._item_bytes.get(item.kind, INLINE_BYTES) for item in request.media)
        files = sum(len(getattr(item, "source", b"")) for item in request.media)
        return self._encoder.encode_inline if max(features, files) < INLINE_BYTES else self._encode_by_reference

    async def stream(self, request: Request, features: Features) -> AsyncGenerator[list[Event]]:
        started = False
        for last_try in (False, True):
            try:
                stream = self._decoder_for(features).stream.options(stream=True)
                async for batch in _items(stream.remote(_without_media(request), features)):
                    started = True
                    yield batch
                return
            except Unavailable:
                if started or last_try:
                    raise
                features = await self.encode(request)

    async def complete(self, request: Request, features: Features) -> list[Event]:
        try:
            return await self._complete(request, features)
        except Unavailable:
            return await self._complete(request, await self.encode(request))

    async def _complete(self, request: Request, features: Features) -> list[Event]:
        return await _result(self._decoder_for(features).complete.remote(_without_media(request), features))

    def _decoder_for(self, features: Features) -> Any:
        return self._by_reference if "ref" in features.encoded else self._decoder

    async def info(self) -> ModelInfo:
        if self._info is None:
            kinds, max_context_tokens = await asyncio.gather(
                _result(self._encoder.kinds.remote()), _result(self._decoder.max_context_tokens.remote())
            )
            self._info = ModelInfo(
                kinds=kinds, max_context_tokens=max_context_tokens, default_reducer=self._default_reducer
            )
        return self._info

    async def load(self) -> Load:
        # Answered even when every slot is taken: a broadcast does not queue behind requests.
        loads: list[Load] = await self._decoder.broadcast("load").results_async(timeout_s=2.0)
        return Load(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            engines=tuple(stats for load in loads for stats in load.engines),
        )

    async def healthy(self) -> bool:
        return await self._is_healthy()


def _without_media(request: Request) -> Request:
    """What the decoder needs of a request; pixels and files never travel to it."""
    return replace(request, media=())


async def _result(response: Any) -> Any:
    """A replica's answer; its errors come out as what they are."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        raise _unwrapped(error) from None


async def _items(response: Any) -> AsyncIterator[Any]:
    try:
        async for item in response:
            yield item
    except Exception as error:
        raise _unwrapped(error) from None
    finally:
        response.cancel()


def _unwrapped(error: Exception) -> Exception:
    """Ray's wrapping taken off, and Ray's own failures in our words."""
    from ray.exceptions import (
        ActorDiedError,
        ActorUnavailableError,
        NodeDiedError,
        RayTaskError,
        TaskCancelledError,
        WorkerCrashedError,
    )
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

    if isinstance(error, RayTaskError):
        cause = error.cause
        error = _unwrapped(cause) if isinstance(cause, Exception) else error
    if isinstance(error, BackPressureError):
        return CapacityError("the server is busy; try again shortly")
    gone = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError, TaskCancelledError)
    if isinstance(error, (*gone, DeploymentUnavailableError, ReplicaUnavailableError)):
        return Unavailable("a part of the server is restarting; try again shortly", 5)
    return error
