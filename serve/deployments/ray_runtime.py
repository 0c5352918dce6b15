"""Both halves of a request in Ray Serve replicas, reached through handles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from mm.data.outputs import Event
from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia, ItemCount
from mm.encode.clip_stream import OnProgress
from mm.errors import CapacityError
from mm.plugins.calls import StageStatus
from serve.deployments.affinity import (
    BALANCERS,
    Balancer,
    Beginnings,
    Ticket,
    beginnings,
    media_keys,
    media_load,
    named,
)
from serve.deployments.availability import NEW_WAIT_S, SILENT_S, STAGES, Pulse, Stage
from serve.deployments.calls import first, retried, unwrapped
from serve.deployments.messages import INLINE_BYTES, TransferredMedia
from serve.deployments.resumption import Progress, reproducible
from serve.deployments.transport import receive
from serve.runtime import (
    DecoderLoad,
    Health,
    MediaHandle,
    MediaLost,
    ModelInfo,
    PromptCount,
    Unavailable,
    joined,
    needs_encoder,
    needs_long_check,
)

T = TypeVar("T")

STATUS_TIMEOUT_S = 0.5
MAX_STREAM_LOSSES = 20
"""Decoders that one stream may lose, though each gave some of it."""
RESUME_S = 0.1
"""Before a stream that lost its decoder, or was refused by a full one, asks again for its rest."""


class RayRuntime:
    """Both halves in Ray Serve replicas, reached through handles.

    The caller keeps the request with its media, so a lost replica costs one more encoding or decoding and not the
    request. A stream that has begun goes on at another decoder; see `serve.deployments.resumption`.

    Args:
        encoder, decoder: Handles of the `Encoder` and `Decoder` deployments.
    """

    def __init__(self, encoder: DeploymentHandle, decoder: DeploymentHandle, default_reducer: str) -> None:
        self._encoder_stage, self._decoder_stage = Stage("encoder"), Stage("decoder")
        STAGES.update({encoder.deployment_name: self._encoder_stage, decoder.deployment_name: self._decoder_stage})
        self._encoders, self._decoders = Balancer(), Balancer()
        BALANCERS.update({encoder.deployment_name: self._encoders, decoder.deployment_name: self._decoders})
        # Object references are only counted, and so kept alive, on calls that go through Ray itself.
        self._encode_by_reference = encoder.options(_by_reference=True).encode
        self._item_bytes: dict[str, int] = {}
        self._by_reference = decoder.options(_by_reference=True)
        self._encoder, self._decoder = encoder, decoder
        self._default_reducer = default_reducer
        self._pulses = {
            stage: Pulse(partial(_ping, handle.options(_by_reference=True)))
            for stage, handle in ((self._encoder_stage, encoder), (self._decoder_stage, decoder))
        }
        self._info: ModelInfo | None = None
        self._limits: TextLimits | None = None

    async def admit(self, request: Request) -> None:
        await self._decoder_stage.wait_until_present(NEW_WAIT_S)
        limits = await self._text_limits()
        limits.check(request.messages)
        if needs_long_check(request, limits):
            await self._ask_decoder(self._decoder.check_length, _without_media(request))

    async def _text_limits(self) -> TextLimits:
        limits = self._limits or await self._ask_decoder(self._decoder.text_limits)
        self._limits = limits
        return limits

    async def _ask_decoder(self, method: Any, *arguments: Any) -> Any:
        """The result of a quick method of a decoder."""

        async def attempt(loss: Unavailable | None) -> Any:
            return await self._decoder_stage.through(_result(method, *arguments), is_new=loss is None)

        return await retried(attempt)

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> TransferredMedia:
        if not needs_encoder(request):
            return TransferredMedia(inline=[], reducer=self._default_reducer)
        await self._encoder_stage.wait_until_present(NEW_WAIT_S)
        size = sum(len(getattr(item, "source", b"")) for item in request.media if hasattr(item, "source"))
        keys = media_keys(request) if size < INLINE_BYTES else await asyncio.to_thread(media_keys, request)
        return await self._encode(request, keys, is_new=True)

    async def count(self, request: Request) -> PromptCount:
        await self.admit(request)
        items: tuple[ItemCount, ...] = ()
        if needs_encoder(request):
            await self._encoder_stage.wait_until_present(NEW_WAIT_S)

            async def attempt(loss: Unavailable | None) -> tuple[ItemCount, ...]:
                return await self._encoder_stage.through(_result(self._encoder.count, request), is_new=loss is None)

            items = await retried(attempt)
        length = await self._ask_decoder(self._decoder.prompt_length, _without_media(request), items)
        return PromptCount(num_tokens=length, items=items)

    async def token_ids(self, request: Request) -> list[int]:
        await self.admit(request)
        return await self._ask_decoder(self._decoder.token_ids, request)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        return await self._ask_decoder(self._decoder.text_of, list(token_ids))

    async def _encode(self, request: Request, keys: tuple[str, ...], *, is_new: bool) -> TransferredMedia:
        load = media_load(request)

        async def attempt(loss: Unavailable | None) -> TransferredMedia:
            order = self._encoders.encoders(keys[0], load) if keys else []
            here = self._encoders.load_at(order[0], keys[0], load) if order else load
            call = _result(_to_first(self._encode_for(request), order), request)
            with self._encoders.given(order, here) as ticket:
                on_routed = None if ticket is None else partial(self._encoders.move, ticket)
                media = await self._encoder_stage.through(call, is_new=is_new and loss is None, on_routed=on_routed)
                if ticket is not None:
                    self._encoders.learn(ticket.replica, keys[0])
                return media

        media = await retried(attempt)
        self._learn_size(request, media)
        return replace(media, keys=keys)

    def _learn_size(self, request: Request, media: TransferredMedia) -> None:
        if media.num_items:
            size = media.num_bytes // media.num_items
            for kind in {item.kind for item in request.media}:
                self._item_bytes[kind] = max(size, self._item_bytes.get(kind, 0))

    async def collect(self, media: MediaHandle) -> EncodedMedia:
        assert isinstance(media, TransferredMedia), "media of another runtime"
        return await receive(media)

    def _encode_for(self, request: Request) -> Any:
        """The call that suits the size of the encoded media, which is estimated from earlier requests."""
        media = sum(self._item_bytes.get(item.kind, INLINE_BYTES) for item in request.media)
        files = sum(len(getattr(item, "source", b"")) for item in request.media)
        return self._encoder.encode_inline if max(media, files) < INLINE_BYTES else self._encode_by_reference

    async def stream(self, request: Request, media: MediaHandle) -> AsyncGenerator[list[Event]]:
        """Events as they come. A stream whose decoder is lost goes on at another one, behind what it has given."""
        progress = Progress(reproducible(request))
        num_losses, loss = 0, None
        while True:
            num_before = progress.num_tokens
            try:
                async with contextlib.aclosing(self._stream_rest(request, progress, media, loss)) as batches:
                    async for batch in batches:
                        yield batch
                return
            except CapacityError as error:
                if not progress.num_tokens:
                    raise  # nothing has been sent, so the refusal is an answer
                is_lost = isinstance(error, Unavailable)
                if is_lost and (progress.num_tokens == num_before or num_losses == MAX_STREAM_LOSSES):
                    raise
                num_losses += is_lost
                loss = error if is_lost else Unavailable("the decoder was full")
            await asyncio.sleep(RESUME_S)

    async def _stream_rest(
        self, request: Request, progress: Progress, media: MediaHandle, loss: Unavailable | None
    ) -> AsyncGenerator[list[Event]]:
        """What is missing of a stream, from one decoder."""

        async with contextlib.AsyncExitStack() as given:

            async def attempt(loss: Unavailable | None) -> tuple[list[Event], AsyncGenerator[list[Event]]]:
                await given.aclose()  # of an attempt before this one
                current = await self._media(request, media, loss)
                asked, order = self._routed(progress.rest(), current)
                ticket = given.enter_context(self._decoders.given(order, 1.0))
                method = _to_first(self._decoder_for(current).stream.options(stream=True), order)
                events = _items(method, asked, current)
                return await self._decode(first(events), current, loss, ticket), events

            begun, rest = await retried(attempt, loss)
            given.push_async_callback(rest.aclose)
            yield progress.take(begun)
            async for batch in rest:
                yield progress.take(batch)

    async def complete(self, request: Request, media: MediaHandle) -> list[Event]:
        async def attempt(loss: Unavailable | None) -> list[Event]:
            current = await self._media(request, media, loss)
            asked, order = self._routed(request, current)
            call = _result(_to_first(self._decoder_for(current).complete, order), asked, current)
            with self._decoders.given(order, 1.0) as ticket:
                return await self._decode(call, current, loss, ticket)

        return await retried(attempt)

    async def _media(self, request: Request, media: MediaHandle, loss: Unavailable | None) -> TransferredMedia:
        """The request's encoded media; encoded again if they were lost."""
        assert isinstance(media, TransferredMedia), "media of another runtime"
        return await self._encode(request, media.keys, is_new=False) if isinstance(loss, MediaLost) else media

    def _routed(self, request: Request, media: TransferredMedia) -> tuple[Request, list[str]]:
        """What a decoder gets of a request, and the decoders in the order in which they should take it."""
        is_known = len(media.keys) == len(request.media)
        begins = beginnings(request, media.keys, media.reducer) if is_known else Beginnings()
        return replace(_without_media(request), prefix_keys=begins.kept), self._decoders.decoders(begins.wanted)

    async def _decode(
        self, call: Coroutine[Any, Any, T], media: TransferredMedia, loss: Unavailable | None, ticket: Ticket | None
    ) -> T:
        """The result of a decoder. A request whose media were encoded is not new any more."""
        is_new = loss is None and not media.num_items
        on_routed = None if ticket is None else partial(self._decoders.move, ticket)
        return await self._decoder_stage.through(call, is_new=is_new, on_routed=on_routed)

    def _decoder_for(self, media: TransferredMedia) -> Any:
        return self._by_reference if media.reference is not None else self._decoder

    async def info(self) -> ModelInfo:
        if self._info is None:
            kinds, limits = await asyncio.gather(
                self._encoder_stage.through(_result(self._encoder.kinds), is_new=True), self._text_limits()
            )
            self._info = ModelInfo(
                kinds=kinds, max_context_tokens=limits.max_context_tokens, default_reducer=self._default_reducer
            )
        return self._info

    async def load(self) -> DecoderLoad:
        # A broadcast does not wait in the queue of requests, so it is answered even when all replicas are full.
        answers = await self._decoder.broadcast("load").results_async(timeout_s=2.0, return_exceptions=True)
        loads = [answer for answer in answers if isinstance(answer, DecoderLoad)]
        return DecoderLoad(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            engines=tuple(stats for load in loads for stats in load.engines),
            routing={"encoder": self._encoders.stats, "decoder": self._decoders.stats},
        )

    async def health(self) -> Health:
        silent = await asyncio.gather(*(pulse.is_silent() for pulse in self._pulses.values()))
        stages = tuple(self._pulses)
        return Health(
            missing=tuple(stage.name for stage in stages if not stage.is_present),
            silent=tuple(stage.name for stage, is_silent in zip(stages, silent, strict=True) if is_silent),
        )

    async def status(self) -> StageStatus:
        """What the replicas say that answer at once. The others are no plugin's fault, or are seen by `health`."""
        asked = [
            handle.broadcast("status").results_async(timeout_s=STATUS_TIMEOUT_S)
            for handle in (self._encoder, self._decoder)
        ]
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return joined(status for statuses in found if isinstance(statuses, list) for status in statuses)

    def drain(self) -> None:
        """Does nothing: Ray stops routing to a replica before it ends it, and waits for the replica's requests."""


async def _ping(handle: DeploymentHandle) -> None:
    """Ask every replica for a sign of life. Raises if none gives one; calls to dead ones tell the router."""
    answers = await handle.broadcast("ping").results_async(timeout_s=SILENT_S, return_exceptions=True)
    if all(isinstance(answer, Exception) for answer in answers):
        raise Unavailable("no replica answers")


def _without_media(request: Request) -> Request:
    """What the decoder needs of a request; pixels and files never travel to it."""
    return replace(request, media=())


async def _result(method: Any, *arguments: Any) -> Any:
    """A replica's result. Its errors are raised as what they are."""
    response = method.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        raise unwrapped(error) from None


async def _items(method: Any, *arguments: Any) -> AsyncGenerator[Any]:
    response = method.remote(*arguments)
    try:
        async for item in response:
            yield item
    except Exception as error:
        raise unwrapped(error) from None
    finally:
        response.cancel()


def _to_first(method: Any, order: list[str]) -> Any:
    """A method of a deployment whose call goes to the first of these replicas that takes it."""
    return method.options(session_id=named(order)) if order else method
