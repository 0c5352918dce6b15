"""The decoder's replica: holds the language model and answers, one request at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray import serve as ray_serve

from mm.data.outputs import Event
from mm.data.request import Request
from serve.config import ServeConfig
from serve.deployments.router import routing_stats
from serve.deployments.transport import receive
from serve.runtime import Features, Load
from serve.stages import build_decoder_stage


@ray_serve.deployment(name="Decoder")
class Decoder:
    def __init__(self, config: ServeConfig) -> None:
        self._stage = build_decoder_stage(config)

    async def stream(self, request: Request, features: Features) -> AsyncIterator[list[Event]]:
        async for batch in self._stage.stream(request, await receive(features), features.reducer):
            yield batch

    async def complete(self, request: Request, features: Features) -> list[Event]:
        return await self._stage.complete(request, await receive(features), features.reducer)

    async def load(self) -> Load:
        return self._stage.load

    def record_routing_stats(self) -> dict[str, Any]:
        """Ray asks for these from time to time and hands them to the routers."""
        (stats,) = self._stage.load.engines
        return routing_stats(stats)

    async def max_context_tokens(self) -> int:
        return self._stage.max_context_tokens
