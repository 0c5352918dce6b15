"""What the encoder's half of a request needs, built once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mm.config import MediaLimits, ReducerPolicy, SourcePolicy
from mm.data.media import FrameSampling
from mm.encode.feature_cache import FeatureCache
from mm.media import DecodeMemory
from mm.plugins.calls import PluginCalls
from mm.plugins.encoder import Encoder
from mm.plugins.registry import name_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EncodeParts:
    """An encoder with its cache, defaults and limits.

    Attributes:
        host: Name of the encoder or model in error messages.
        model: The checkpoint's folder, beside which learned reducers have their weights; None for an encoder by name.
        device: Where learned reducers compute.
        reducer: Text of the reducer for requests that name none.
        frames: Frame sampling for requests that name none.
        policy: What requests may do with reducers.
        memory: Lends the memory of decoded pixels to all requests. None counts each request by itself.
        calls: Calls the encoder and the reducers.
    """

    encoder: Encoder
    cache: FeatureCache
    host: str
    model: Path | None = None
    device: str = "cpu"
    reducer: str = "none"
    frames: FrameSampling = field(default_factory=FrameSampling)
    limits: MediaLimits = field(default_factory=MediaLimits)
    sources: SourcePolicy = field(default_factory=SourcePolicy)
    policy: ReducerPolicy = field(default_factory=ReducerPolicy)
    memory: DecodeMemory | None = None
    calls: PluginCalls = field(default_factory=PluginCalls)


def call_encoder(parts: EncodeParts, function: Callable[[], T]) -> T:
    """The encoder's result, within its time."""
    name, limit_s = name_of(parts.encoder), parts.calls.limits.encoder_timeout_s
    return parts.calls.call("encoder", (name,), "while it encoded", function, timeout_s=limit_s)
