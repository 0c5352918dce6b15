"""The encoder's replica: holds tower and projector, and publishes features by reference."""

from __future__ import annotations

from dataclasses import replace

import ray
from ray import serve as ray_serve

from mm.data.request import Request
from serve.config import ServeConfig
from serve.deployments.transport import num_bytes, pack
from serve.runtime import INLINE_BYTES, Features
from serve.stages import build_encoder_stage


@ray_serve.deployment(name="Encoder")
class Encoder:
    def __init__(self, config: ServeConfig) -> None:
        self._stage = build_encoder_stage(config)

    async def encode(self, request: Request) -> Features:
        features = await self.encode_inline(request)
        if features.num_bytes < INLINE_BYTES:
            return features
        # Inside a dict, so that Ray passes the reference on instead of resolving it at the next hop.
        return replace(features, encoded={"ref": ray.put(features.encoded["items"])})

    async def encode_inline(self, request: Request) -> Features:
        """As `encode`, for features known to be small: the answer holds them, so it may take the shorter way."""
        features = await self._stage.encode(request)
        items = pack(features.encoded)
        return replace(features, encoded={"items": items}, num_bytes=num_bytes(items))

    async def kinds(self) -> tuple[str, ...]:
        return self._stage.kinds
