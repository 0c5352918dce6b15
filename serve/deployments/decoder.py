"""The decoder replica: it holds the language model and generates."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ray import serve as ray_serve

from mm.data.outputs import Event
from mm.data.request import Request
from serve.config import ServeConfig
from serve.deployments.accelerator import on_this_replica
from serve.deployments.loop_replica import LoopReplica
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import HandedKV, TransferredMedia
from serve.deployments.transport import receive, received
from serve.stages import build_decoder_loop


@ray_serve.deployment(name="Decoder")
class Decoder(LoopReplica):
    def __init__(self, config: ServeConfig) -> None:
        keep_replica_local()
        super().__init__(*build_decoder_loop(on_this_replica(config)))

    async def stream(self, request: Request, media: TransferredMedia) -> AsyncIterator[list[Event]]:
        async for batch in self._loop.stream(request, await receive(media)):
            yield batch

    async def complete(self, request: Request, media: TransferredMedia) -> list[Event]:
        return await self._loop.complete(request, await receive(media))

    async def go_on(
        self, request: Request, media: TransferredMedia, handed: HandedKV, is_streamed: bool
    ) -> AsyncIterator[list[Event]]:
        """The rest of a request that a prefill replica has begun.

        The first batch says that its keys and values are here.

        Args:
            is_streamed: Whether events are wanted as they come; otherwise all after the first batch come at the end.
        """
        has_begun, kept = False, list[Event]()
        async for batch in self._loop.stream(request, await received(handed, await receive(media))):
            if has_begun and not is_streamed:
                kept += batch
            else:
                yield batch
            has_begun = True
        if kept:
            yield kept
