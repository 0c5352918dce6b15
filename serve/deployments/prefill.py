"""The prefill replica: it computes prompts and first tokens, and hands the rest to a decoder."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ray import serve as ray_serve

from mm.data.outputs import Event
from mm.data.request import Request
from mm.engine.kv_transfer.messages import HandOff, KVPiece
from mm.errors import InvalidOption
from serve.config import ServeConfig
from serve.deployments.accelerator import on_this_replica
from serve.deployments.loop_replica import LoopReplica
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import Carried, Prefilled, TransferredMedia
from serve.deployments.transport import TRANSPORTS, receive, sent
from serve.stages import build_decoder_loop


@ray_serve.deployment(name="Prefill")
class Prefill(LoopReplica):
    def __init__(self, config: ServeConfig) -> None:
        keep_replica_local()
        loop, limits = build_decoder_loop(on_this_replica(config))
        if not loop.hands_over:
            raise InvalidOption("serve", "split", "was 'epd', for which this engine cannot hand requests over; say ep")
        super().__init__(loop, limits)
        self._transport = TRANSPORTS[config.kv_transport]

    async def begin(self, request: Request, media: TransferredMedia) -> AsyncIterator[Prefilled]:
        """The first tokens of a request, and what a decoder needs to go on.

        The blocks stay until the call is cancelled: so the ingress says that a decoder has everything.
        """
        async for batch in self._loop.hand_over(request, await receive(media)):
            events, pieces, state = list[Event](), list[Carried](), None
            for one in batch:
                if isinstance(one, KVPiece):
                    pieces.append(await sent(one, self._transport))
                elif isinstance(one, HandOff):
                    state = await sent(one, self._transport)
                else:
                    events.append(one)
            yield Prefilled(events=events, pieces=pieces, state=state)
