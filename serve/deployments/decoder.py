"""The decoder replica: it holds the language model and generates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray import serve as ray_serve

from mm.data.outputs import Event
from mm.data.request import Request, TextLimits
from mm.data.tokens import ItemCount
from mm.plugins.calls import StageStatus
from serve.config import ServeConfig
from serve.deployments.accelerator import on_this_replica
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import TransferredMedia
from serve.deployments.router import routing_stats
from serve.deployments.transport import receive
from serve.runtime import DecoderLoad
from serve.stages import build_decoder_loop


@ray_serve.deployment(name="Decoder")
class Decoder:
    def __init__(self, config: ServeConfig) -> None:
        keep_replica_local()
        self._loop, self._limits = build_decoder_loop(on_this_replica(config))

    async def stream(self, request: Request, media: TransferredMedia) -> AsyncIterator[list[Event]]:
        async for batch in self._loop.stream(request, await receive(media)):
            yield batch

    async def complete(self, request: Request, media: TransferredMedia) -> list[Event]:
        return await self._loop.complete(request, await receive(media))

    async def load(self) -> DecoderLoad:
        return DecoderLoad.of(self._loop.stats)

    async def status(self) -> StageStatus:
        return self._loop.status()

    async def check_health(self) -> None:
        """Ray calls this from time to time, and replaces a replica for which it raises."""
        if problems := self._loop.status().problems:
            raise RuntimeError("; ".join(problems))

    def record_routing_stats(self) -> dict[str, Any]:
        """Ray calls this from time to time and hands the result to the routers."""
        return routing_stats(self._loop.stats, self._loop.held_prefixes)

    async def ping(self) -> None:
        """Return: a sign of life of the event loop."""

    async def text_limits(self) -> TextLimits:
        return self._limits

    async def prompt_length(self, request: Request, items: tuple[ItemCount, ...]) -> int:
        return await self._loop.prompt_length(request, items)

    async def check_length(self, request: Request) -> None:
        await self._loop.check_length(request)

    async def token_ids(self, request: Request) -> list[int]:
        return await self._loop.token_ids(request)

    async def text_of(self, token_ids: list[int]) -> str:
        return await self._loop.text_of(token_ids)
