"""Both halves of a request in Ray Serve replicas, reached through handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.errors import CapacityError
from mm.plugins.calls import StageStatus
from serve.deployments.messages import INLINE_BYTES, TransferredMedia
from serve.deployments.transport import receive
from serve.runtime import DecoderLoad, MediaHandle, ModelInfo, Unavailable, joined, needs_encoder

GONE = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    WorkerCrashedError,
    TaskCancelledError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
"""Errors of Ray that mean that a replica is not there."""


STATUS_TIMEOUT_S = 0.5


class RayRuntime:
    """Both halves in Ray Serve replicas, reached through handles.

    The caller keeps the request with its media, so a lost encoder costs one more encoding and not the request.

    Args:
        encoder, decoder: Handles of the `Encoder` and `Decoder` deployments.
        is_healthy: Whether both have a running replica.
    """

    def __init__(
        self,
        encoder: DeploymentHandle,
        decoder: DeploymentHandle,
        default_reducer: str,
        is_healthy: Callable[[], Awaitable[bool]],
    ) -> None:
        # Object references are only counted, and so kept alive, on calls that go through Ray itself.
        self._encode_by_reference = encoder.options(_by_reference=True).encode
        self._item_bytes: dict[str, int] = {}
        self._by_reference = decoder.options(_by_reference=True)
        self._encoder, self._decoder = encoder, decoder
        self._default_reducer = default_reducer
        self._is_healthy = is_healthy
        self._info: ModelInfo | None = None

    async def encode(self, request: Request) -> TransferredMedia:
        if not needs_encoder(request):
            return TransferredMedia(inline=[], reducer=self._default_reducer)
        try:
            media = await _result(self._encode_for(request).remote(request))
        except Unavailable:
            media = await _result(self._encode_for(request).remote(request))
        if media.num_items:
            size = media.num_bytes // media.num_items
            for kind in {item.kind for item in request.media}:
                self._item_bytes[kind] = max(size, self._item_bytes.get(kind, 0))
        return media

    async def collect(self, media: MediaHandle) -> EncodedMedia:
        assert isinstance(media, TransferredMedia), "media of another runtime"
        return await receive(media)

    def _encode_for(self, request: Request) -> Any:
        """The call that suits the size of the encoded media, which is estimated from earlier requests."""
        media = sum(self._item_bytes.get(item.kind, INLINE_BYTES) for item in request.media)
        files = sum(len(getattr(item, "source", b"")) for item in request.media)
        return self._encoder.encode_inline if max(media, files) < INLINE_BYTES else self._encode_by_reference

    async def stream(self, request: Request, media: MediaHandle) -> AsyncGenerator[list[Event]]:
        started = False
        assert isinstance(media, TransferredMedia), "media of another runtime"
        for last_try in (False, True):
            try:
                stream = self._decoder_for(media).stream.options(stream=True)
                async for batch in _items(stream.remote(_without_media(request), media)):
                    started = True
                    yield batch
                return
            except Unavailable:
                if started or last_try:
                    raise
                media = await self.encode(request)

    async def complete(self, request: Request, media: MediaHandle) -> list[Event]:
        assert isinstance(media, TransferredMedia), "media of another runtime"
        try:
            return await self._complete(request, media)
        except Unavailable:
            return await self._complete(request, await self.encode(request))

    async def _complete(self, request: Request, media: TransferredMedia) -> list[Event]:
        return await _result(self._decoder_for(media).complete.remote(_without_media(request), media))

    def _decoder_for(self, media: TransferredMedia) -> Any:
        return self._by_reference if media.reference is not None else self._decoder

    async def info(self) -> ModelInfo:
        if self._info is None:
            kinds, max_context_tokens = await asyncio.gather(
                _result(self._encoder.kinds.remote()), _result(self._decoder.max_context_tokens.remote())
            )
            self._info = ModelInfo(
                kinds=kinds, max_context_tokens=max_context_tokens, default_reducer=self._default_reducer
            )
        return self._info

    async def load(self) -> DecoderLoad:
        # A broadcast does not wait in the queue of requests, so it is answered even when all replicas are full.
        loads: list[DecoderLoad] = await self._decoder.broadcast("load").results_async(timeout_s=2.0)
        return DecoderLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            engines=tuple(stats for load in loads for stats in load.engines),
        )

    async def healthy(self) -> bool:
        return await self._is_healthy()

    async def status(self) -> StageStatus:
        """What the replicas say that answer at once. The others are no plugin's fault, or are seen by `healthy`."""
        asked = [
            handle.broadcast("status").results_async(timeout_s=STATUS_TIMEOUT_S)
            for handle in (self._encoder, self._decoder)
        ]
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return joined(status for statuses in found if isinstance(statuses, list) for status in statuses)

    def drain(self) -> None:
        """Does nothing: Ray stops routing to a replica before it ends it, and waits for the replica's requests."""


def _without_media(request: Request) -> Request:
    """What the decoder needs of a request; pixels and files never travel to it."""
    return replace(request, media=())


async def _result(response: Any) -> Any:
    """A replica's result. Its errors are raised as what they are."""
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
    """The error inside Ray's wrapper. Ray's own failures become our errors."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        error = _unwrapped(cause) if isinstance(cause, Exception) else error
    if isinstance(error, BackPressureError):
        return CapacityError("the server is busy; try again shortly")
    if isinstance(error, GONE):
        return Unavailable("a part of the server is restarting; try again shortly", 5)
    return error
