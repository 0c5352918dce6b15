"""What the encoder's half of a request needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.config import MediaLimits, ReducerPolicy, SourcePolicy, VideoDecoder
from mm.data.media import FrameSampling
from mm.encode.feature_cache import FeatureCache
from mm.plugins.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class EncodeParts:
    """What the encoder's half needs. `host` names the encoder in messages."""

    encoder: Encoder
    cache: FeatureCache
    host: str
    reducer: str = "none"
    frames: FrameSampling = field(default_factory=FrameSampling)
    limits: MediaLimits = field(default_factory=MediaLimits)
    sources: SourcePolicy = field(default_factory=SourcePolicy)
    video_decoder: VideoDecoder = "pyav"
    policy: ReducerPolicy = field(default_factory=ReducerPolicy)
