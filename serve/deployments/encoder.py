"""The encoder's replica: holds tower and projector, and publishes features by reference."""

from __future__ import annotations

from dataclasses import replace

import ray
from ray import serve as ray_serve

from mm.core.data import Request
from serve.config import ServeConfig
from serve.deployments.transport import INLINE_BYTES, num_bytes, pack
from serve.runtime import Features
from serve.stages import build_encoder_stage


@ray_serve.deployment(name="Encoder")
class Encoder:
    def __init__(self, config: ServeConfig) -> None:
        self._stage = build_encoder_stage(config)

    async def encode(self, request: Request) -> Features:
        features = await self._stage.encode(request)
        items = pack(features.encoded)
        if num_bytes(items) < INLINE_BYTES:
            return replace(features, encoded={"items": items})
        # Inside a dict, so that Ray passes the reference on instead of resolving it at the next hop.
        return replace(features, encoded={"ref": ray.put(items)})

    async def kinds(self) -> tuple[str, ...]:
        return self._stage.kinds
