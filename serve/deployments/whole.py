"""The replica that has both halves: media are encoded and their tokens used in one place."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ray import serve as ray_serve

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia, ItemCount
from mm.plugins.calls import StageStatus
from serve.config import ServeConfig
from serve.deployments.accelerator import on_this_replica
from serve.deployments.affinity import media_load
from serve.deployments.loop_replica import LoopReplica
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import TransferredMedia
from serve.deployments.transport import num_bytes, pack
from serve.runtime import MediaLost
from serve.stages import build_whole


@dataclass(eq=False)
class HeldMedia:
    """Encoded media between a request's two calls.

    Args:
        max_age_s: What nobody took for so long is dropped.
    """

    max_age_s: float
    _items: dict[str, tuple[float, EncodedMedia]] = field(default_factory=dict[str, tuple[float, EncodedMedia]])

    def put(self, media: EncodedMedia) -> str:
        """Hold media. Returns a name for them."""
        now = time.monotonic()
        while self._items and now - next(iter(self._items.values()))[0] > self.max_age_s:
            del self._items[next(iter(self._items))]
        name = secrets.token_hex(8)
        self._items[name] = now, media
        return name

    def take(self, name: str) -> EncodedMedia:
        """Give media away.

        Raises:
            MediaLost: They are not here, or not any more.
        """
        if name not in self._items:
            raise MediaLost("the encoded media are not at this replica; encode them again")
        return self._items.pop(name)[1]


@ray_serve.deployment(name="Model")
class Whole(LoopReplica):
    def __init__(self, config: ServeConfig) -> None:
        keep_replica_local()
        self._runtime, loop, limits = build_whole(on_this_replica(config))
        super().__init__(loop, limits)
        self._held, self._load = HeldMedia(config.request_timeout_s), 0.0

    async def encode_held(self, request: Request) -> TransferredMedia:
        """Encode media and hold them for the call that generates."""
        load = media_load(request)
        self._load += load
        try:
            media = await self._runtime.encode(request)
        finally:
            self._load -= load
        return TransferredMedia(
            reducer=media.reducer,
            num_items=media.num_items,
            num_cache_hits=media.num_cache_hits,
            media_bytes=media.media_bytes,
            held=self._held.put(media) if media.num_items else "",
            inline=[],
        )

    async def stream(self, request: Request, media: TransferredMedia) -> AsyncIterator[list[Event]]:
        async for batch in self._loop.stream(request, self._taken(media)):
            yield batch

    async def complete(self, request: Request, media: TransferredMedia) -> list[Event]:
        return await self._loop.complete(request, self._taken(media))

    async def collect(self, media: TransferredMedia) -> TransferredMedia:
        """The media themselves, which travel inside the message."""
        items = pack(self._taken(media).items)
        return TransferredMedia(reducer=media.reducer, num_bytes=num_bytes(items), inline=items)

    def _taken(self, media: TransferredMedia) -> EncodedMedia:
        return self._held.take(media.held) if media.held else EncodedMedia(reducer=media.reducer)

    async def count(self, request: Request) -> tuple[ItemCount, ...]:
        return await self._runtime.count_items(request)

    async def status(self) -> StageStatus:
        return await self._runtime.status()

    def record_routing_stats(self) -> dict[str, Any]:
        return {**super().record_routing_stats(), "load": self._load}

    async def kinds(self) -> tuple[str, ...]:
        return (await self._runtime.info()).kinds
