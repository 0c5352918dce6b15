"""What every replica with a language model answers, whatever of a request it computes."""

from __future__ import annotations

from typing import Any

from mm.data.request import Request, TextLimits
from mm.data.tokens import ItemCount
from mm.engine.loop import EngineLoop
from mm.plugins.calls import StageStatus
from serve.deployments.router import routing_stats
from serve.runtime import DecoderLoad


class LoopReplica:
    """A replica that runs an engine.

    Args:
        loop: Started.
    """

    def __init__(self, loop: EngineLoop, limits: TextLimits) -> None:
        self._loop, self._limits = loop, limits

    async def load(self) -> DecoderLoad:
        return DecoderLoad.of(self._loop.stats)

    async def status(self) -> StageStatus:
        return self._loop.status()

    async def check_health(self) -> None:
        """Ray calls this from time to time, and replaces a replica for which it raises."""
        if problems := (await self.status()).problems:
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
