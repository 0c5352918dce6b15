"""Both halves of a request in Ray Serve replicas, reached through handles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from mm.config import MediaLimits
from mm.data.outputs import Event
from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia, ItemCount
from mm.encode.clip_stream import OnProgress
from mm.plugins.calls import StageStatus
from serve.config import KVTransport
from serve.deployments.affinity import media_keys
from serve.deployments.availability import NEW_WAIT_S
from serve.deployments.calls import result_of, retried, to_first, without_media
from serve.deployments.decoding import Decoding
from serve.deployments.encoding import Encoding
from serve.deployments.handing import Gate, Transfers
from serve.deployments.messages import INLINE_BYTES, TransferredMedia
from serve.deployments.tier import Tier
from serve.deployments.transport import receive
from serve.runtime import (
    DecoderLoad,
    Health,
    MediaHandle,
    ModelInfo,
    PromptCount,
    Unavailable,
    joined,
    needs_encoder,
    needs_long_check,
)

STATUS_TIMEOUT_S = 0.5


class RayRuntime:
    """Both halves in Ray Serve replicas, reached through handles.

    The caller keeps the request with its media, so a lost replica costs one more encoding or decoding and not the
    request. A stream that has begun goes on at another decoder; see `serve.deployments.resumption`.

    Args:
        encoder, decoder: Handles of the `Encoder` and `Decoder` deployments, or twice that of `Model`.
        prefill: Handle of the `Prefill` deployment, where it computes the prompts.
        gate: Holds encoders back while the prefill stage is full.
        transport: From prefill to decode.
        limits: Of the media of a request.
    """

    def __init__(
        self,
        encoder: DeploymentHandle,
        decoder: DeploymentHandle,
        default_reducer: str,
        prefill: DeploymentHandle | None = None,
        *,
        gate: Gate | None = None,
        transport: KVTransport = "auto",
        limits: MediaLimits | None = None,
    ) -> None:
        self._is_whole = encoder is decoder
        self._decoders = Tier.of(decoder, "model" if self._is_whole else "decoder")
        self._encoders = self._decoders if self._is_whole else Tier.of(encoder, "encoder")
        self._prefills = None if prefill is None else Tier.of(prefill, "prefill")
        self._tiers = [self._decoders] if self._is_whole else [self._encoders, self._decoders]
        self._tiers += [] if self._prefills is None else [self._prefills]
        self._gate, self._transfers = gate or Gate(1 << 30), Transfers(transport)
        self._decoding = Decoding(self._decoders, self._prefills, self._gate, self._transfers, self._encode_again)
        self._encoding = Encoding(encoder, self._encoders, is_whole=self._is_whole, limits=limits)
        self._encoder, self._decoder = encoder, decoder
        self._default_reducer = default_reducer
        self._info: ModelInfo | None = None
        self._limits: TextLimits | None = None

    async def admit(self, request: Request) -> None:
        await self._decoders.stage.wait_until_present(NEW_WAIT_S)
        if self._prefills is not None:
            await self._prefills.stage.wait_until_present(NEW_WAIT_S)
        limits = await self._text_limits()
        limits.check(request.messages)
        if needs_long_check(request, limits):
            await self._ask_decoder(self._decoder.check_length, without_media(request))

    async def _text_limits(self) -> TextLimits:
        limits = self._limits or await self._ask_decoder(self._decoder.text_limits)
        self._limits = limits
        return limits

    async def _ask_decoder(self, method: Any, *arguments: Any) -> Any:
        """The result of a quick method of a decoder."""

        async def attempt(loss: Unavailable | None) -> Any:
            return await self._decoders.stage.through(result_of(method, *arguments), is_new=loss is None)

        return await retried(attempt)

    def place(self, request: Request) -> contextlib.AbstractAsyncContextManager[None]:
        """Nothing to wait for: Serve's router holds back what the replicas cannot take."""
        return contextlib.nullcontext()

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> TransferredMedia:
        if not needs_encoder(request):
            return TransferredMedia(inline=[], reducer=self._default_reducer)
        await self._encoders.stage.wait_until_present(NEW_WAIT_S)
        await self._gate.wait_for_room()
        size = sum(len(getattr(item, "source", b"")) for item in request.media if hasattr(item, "source"))
        keys = media_keys(request) if size < INLINE_BYTES else await asyncio.to_thread(media_keys, request)
        return await self._encoding.encode(request, keys, is_new=True)

    async def count(self, request: Request) -> PromptCount:
        await self.admit(request)
        items: tuple[ItemCount, ...] = ()
        if needs_encoder(request):
            await self._encoders.stage.wait_until_present(NEW_WAIT_S)

            async def attempt(loss: Unavailable | None) -> tuple[ItemCount, ...]:
                return await self._encoders.stage.through(result_of(self._encoder.count, request), is_new=loss is None)

            items = await retried(attempt)
        length = await self._ask_decoder(self._decoder.prompt_length, without_media(request), items)
        return PromptCount(num_tokens=length, items=items)

    async def token_ids(self, request: Request) -> list[int]:
        await self.admit(request)
        return await self._ask_decoder(self._decoder.token_ids, request)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        return await self._ask_decoder(self._decoder.text_of, list(token_ids))

    async def collect(self, media: MediaHandle) -> EncodedMedia:
        assert isinstance(media, TransferredMedia), "media of another runtime"
        if not media.held:
            return await receive(media)
        there = [media.replica] if media.replica else []
        return await receive(await result_of(to_first(self._decoder.collect, there), media))

    def stream(self, request: Request, media: MediaHandle) -> AsyncGenerator[list[Event]]:
        """Events as they come. A stream whose decoder is lost goes on at another one, behind what it has given."""
        assert isinstance(media, TransferredMedia), "media of another runtime"
        return self._decoding.stream(request, media)

    async def complete(self, request: Request, media: MediaHandle) -> list[Event]:
        assert isinstance(media, TransferredMedia), "media of another runtime"
        return await self._decoding.complete(request, media)

    async def _encode_again(self, request: Request, media: TransferredMedia) -> TransferredMedia:
        """The request's media, which were lost with their encoder."""
        return await self._encoding.encode(request, media.keys, is_new=False)

    async def info(self) -> ModelInfo:
        if self._info is None:
            kinds, limits = await asyncio.gather(
                self._encoders.stage.through(result_of(self._encoder.kinds), is_new=True), self._text_limits()
            )
            self._info = ModelInfo.of(kinds, limits, self._default_reducer)
        return self._info

    async def load(self) -> DecoderLoad:
        # A broadcast does not wait in the queue of requests, so it is answered even when all replicas are full.
        asked = [
            tier.handle.broadcast("load").results_async(timeout_s=2.0, return_exceptions=True)
            for tier in self._tiers
            if self._is_whole or tier is not self._encoders
        ]
        answers = [answer for some in await asyncio.gather(*asked) for answer in some]
        loads = [answer for answer in answers if isinstance(answer, DecoderLoad)]
        return DecoderLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            engines=tuple(stats for load in loads for stats in load.engines),
            routing={tier.stage.name: tier.balancer.stats for tier in self._tiers},
            transfers={} if self._prefills is None else self._transfers.stats,
        )

    async def health(self) -> Health:
        silent = await asyncio.gather(*(tier.pulse.is_silent() for tier in self._tiers))
        return Health(
            missing=tuple(tier.stage.name for tier in self._tiers if not tier.stage.is_present),
            silent=tuple(tier.stage.name for tier, is_silent in zip(self._tiers, silent, strict=True) if is_silent),
        )

    async def status(self) -> StageStatus:
        """What the replicas say that answer at once. The others are no plugin's fault, or are seen by `health`."""
        asked = [tier.handle.broadcast("status").results_async(timeout_s=STATUS_TIMEOUT_S) for tier in self._tiers]
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return joined(status for statuses in found if isinstance(statuses, list) for status in statuses)

    def drain(self) -> None:
        """Does nothing: Ray stops routing to a replica before it ends it, and waits for the replica's requests."""
