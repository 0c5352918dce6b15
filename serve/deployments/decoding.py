"""What a request needs once its media are encoded: prefill and decode, in one replica or in two, whatever is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

from mm.data.outputs import Event
from mm.data.request import Request
from mm.errors import CapacityError
from serve.deployments.affinity import Beginnings, beginnings
from serve.deployments.calls import first, items_of, result_of, retried, to_first, without_media
from serve.deployments.handing import Begun, Gate, Transfers
from serve.deployments.messages import HandedKV, TransferredMedia
from serve.deployments.resumption import Progress, reproducible
from serve.deployments.tier import Tier
from serve.runtime import KVLost, MediaLost, Unavailable

MAX_STREAM_LOSSES = 20
"""Decoders that one stream may lose, though each gave some of it."""
RESUME_S = 0.1
"""Before a stream that lost its decoder, or was refused by a full one, asks again for its rest."""


class Decoding:
    """Gives the events of requests whose media are encoded.

    Args:
        decoders: They generate.
        prefills: They compute prompts; None where decoders do.
        gate: Told how many requests wait for their first token.
        transfers: Told what moved.
        encode_again: Encodes media that were lost.
    """

    def __init__(
        self,
        decoders: Tier,
        prefills: Tier | None,
        gate: Gate,
        transfers: Transfers,
        encode_again: Callable[[Request, TransferredMedia], Awaitable[TransferredMedia]],
    ) -> None:
        self._decoders, self._prefills = decoders, prefills
        self._gate, self._transfers, self._encode_again = gate, transfers, encode_again

    async def stream(self, request: Request, media: TransferredMedia) -> AsyncGenerator[list[Event]]:
        """Events as they come. A stream whose replica is lost goes on at another one, behind what it has given."""
        async with contextlib.aclosing(self._events(request, media, is_streamed=True)) as batches:
            async for batch in batches:
                yield batch

    async def _events(
        self, request: Request, media: TransferredMedia, *, is_streamed: bool
    ) -> AsyncGenerator[list[Event]]:
        progress = Progress(reproducible(request))
        num_losses, loss = 0, None
        while True:
            num_before = progress.num_tokens
            if self._prefills is None:
                rest = self._stream_rest(progress, media, loss)
            else:
                rest = self._through_prefill(self._prefills, progress, media, loss, is_streamed=is_streamed)
            try:
                async with contextlib.aclosing(rest) as batches:
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

    async def _through_prefill(
        self,
        prefills: Tier,
        progress: Progress,
        media: TransferredMedia,
        loss: Unavailable | None,
        *,
        is_streamed: bool,
    ) -> AsyncGenerator[list[Event]]:
        """What is missing of a request: first from a prefill replica, and then from a decoder."""
        async with contextlib.AsyncExitStack() as given:

            async def attempt(loss: Unavailable | None) -> tuple[list[Event], Begun, TransferredMedia]:
                await given.aclose()  # of an attempt before this one
                current = await self._media(progress.request, media, loss)
                asked, order = self._routed(progress.rest(), current, prefills)
                ticket = given.enter_context(prefills.balancer.given(order, 1.0))
                handle = prefills.for_references(self._transfers.uses_references or current.reference is not None)
                work = Begun(items_of(to_first(handle.begin.options(stream=True), order), asked, current))
                given.push_async_callback(work.release)
                with self._gate.passing():
                    events = await prefills.work(work.first(), _is_new(current, loss), ticket)
                return events, work, current

            events, begun, current = await retried(attempt, loss)
            yield progress.take(events)
            async for events in begun.rest():
                yield progress.take(events)
            if begun.handed is None:
                return
            self._transfers.count(begun.handed)
            rest = self._go_on(progress, current, begun, begun.handed, is_streamed=is_streamed)
            async with contextlib.aclosing(rest) as batches:
                async for batch in batches:
                    yield progress.take(batch)

    async def _go_on(
        self, progress: Progress, media: TransferredMedia, begun: Begun, handed: HandedKV, *, is_streamed: bool
    ) -> AsyncGenerator[list[Event]]:
        """The rest of a request that a prefill replica has handed over, from a decoder that has room for it."""
        async with contextlib.AsyncExitStack() as given:

            async def attempt(loss: Unavailable | None) -> tuple[list[Event] | KVLost, AsyncGenerator[list[Event]]]:
                await given.aclose()  # of an attempt before this one
                current = await self._media(progress.request, media, loss)
                handle = self._decoders.for_references(handed.has_references or current.reference is not None)
                while True:
                    asked, order = self._routed(progress.rest(), current, self._decoders)
                    ticket = given.enter_context(self._decoders.balancer.given(order, 1.0))
                    method = to_first(handle.go_on.options(stream=True), order)
                    events = items_of(method, asked, current, handed, is_streamed)
                    try:
                        begins = await self._decoders.work(first(events), _is_new(current, loss), ticket)
                        return begins, events
                    except KVLost as error:
                        return error, events  # no other decoder could get it
                    except CapacityError as error:
                        if isinstance(error, Unavailable):
                            raise
                    await given.aclose()  # all are full: what was computed waits at the prefill replica
                    await asyncio.sleep(RESUME_S)

            begins, rest = await retried(attempt)
            given.push_async_callback(rest.aclose)
            if isinstance(begins, KVLost):
                raise begins
            await begun.release()
            yield begins
            async for batch in rest:
                yield batch

    async def _stream_rest(
        self, progress: Progress, media: TransferredMedia, loss: Unavailable | None
    ) -> AsyncGenerator[list[Event]]:
        """What is missing of a stream, from one decoder."""

        async with contextlib.AsyncExitStack() as given:

            async def attempt(loss: Unavailable | None) -> tuple[list[Event], AsyncGenerator[list[Event]]]:
                await given.aclose()  # of an attempt before this one
                current = await self._media(progress.request, media, loss)
                asked, order = self._routed(progress.rest(), current, self._decoders)
                ticket = given.enter_context(self._decoders.balancer.given(order, 1.0))
                handle = self._decoders.for_references(current.reference is not None)
                events = items_of(to_first(handle.stream.options(stream=True), order), asked, current)
                return await self._decoders.work(first(events), _is_new(current, loss), ticket), events

            begun, rest = await retried(attempt, loss)
            given.push_async_callback(rest.aclose)
            yield progress.take(begun)
            async for batch in rest:
                yield progress.take(batch)

    async def complete(self, request: Request, media: TransferredMedia) -> list[Event]:
        """All events of a request."""
        if self._prefills is not None:
            batches = [batch async for batch in self._events(request, media, is_streamed=False)]
            return [event for batch in batches for event in batch]

        async def attempt(loss: Unavailable | None) -> list[Event]:
            current = await self._media(request, media, loss)
            asked, order = self._routed(request, current, self._decoders)
            handle = self._decoders.for_references(current.reference is not None)
            call = result_of(to_first(handle.complete, order), asked, current)
            with self._decoders.balancer.given(order, 1.0) as ticket:
                return await self._decoders.work(call, _is_new(current, loss), ticket)

        return await retried(attempt)

    async def _media(self, request: Request, media: TransferredMedia, loss: Unavailable | None) -> TransferredMedia:
        """The request's encoded media; encoded again if they were lost."""
        return await self._encode_again(request, media) if isinstance(loss, MediaLost) else media

    def _routed(self, request: Request, media: TransferredMedia, tier: Tier) -> tuple[Request, list[str]]:
        """What a decoder gets of a request, and the replicas in the order in which they should take it."""
        is_known = len(media.keys) == len(request.media)
        begins = beginnings(request, media.keys, media.reducer) if is_known else Beginnings()
        order = tier.balancer.decoders(begins.wanted)
        if media.held and media.replica:
            order = [media.replica, *(name for name in order if name != media.replica)]
        return replace(without_media(request), prefix_keys=begins.kept), order


def _is_new(media: TransferredMedia, loss: Unavailable | None) -> bool:
    """Whether no replica has worked on the request: neither on its media nor on its text."""
    return loss is None and not media.num_items
