"""The encoder replica: it holds tower and projector, and publishes encoded media by reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
from ray import serve as ray_serve

from mm.data.request import Request
from mm.data.tokens import ItemCount
from mm.plugins.calls import StageStatus
from serve.config import ServeConfig
from serve.deployments.accelerator import on_this_replica
from serve.deployments.affinity import media_load
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import INLINE_BYTES, TransferredMedia
from serve.deployments.transport import num_bytes, pack
from serve.stages import build_encoder_stage


@ray_serve.deployment(name="Encoder")
class Encoder:
    def __init__(self, config: ServeConfig) -> None:
        keep_replica_local()
        self._stage = build_encoder_stage(on_this_replica(config))
        self._load = 0.0

    async def encode(self, request: Request) -> TransferredMedia:
        media = await self.encode_inline(request)
        if media.num_bytes < INLINE_BYTES:
            return media
        return replace(media, inline=None, reference=(ray.put(media.inline),))

    async def encode_inline(self, request: Request) -> TransferredMedia:
        """As `encode`, for media that are known to be small: they travel inside the message, which is faster."""
        load = media_load(request)
        self._load += load
        try:
            media = await self._stage.encode(request)
        finally:
            self._load -= load
        items = pack(media.items)
        return TransferredMedia(
            reducer=media.reducer,
            num_items=media.num_items,
            num_cache_hits=media.num_cache_hits,
            media_bytes=media.media_bytes,
            num_bytes=num_bytes(items),
            seconds=sum(item.timings.load_s + item.timings.encode_s + item.timings.reduce_s for item in media.items),
            inline=items,
        )

    async def count(self, request: Request) -> tuple[ItemCount, ...]:
        return await self._stage.count(request)

    async def status(self) -> StageStatus:
        return self._stage.status()

    async def check_health(self) -> None:
        """Ray calls this from time to time, and replaces a replica for which it raises."""
        if problems := self._stage.status().problems:
            raise RuntimeError("; ".join(problems))

    def record_routing_stats(self) -> dict[str, Any]:
        """Ray calls this from time to time and hands the result to the routers."""
        return {"load": self._load}

    async def ping(self) -> None:
        """Return: a sign of life of the event loop."""

    async def kinds(self) -> tuple[str, ...]:
        return self._stage.kinds
