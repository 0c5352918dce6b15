"""What an attention backend is, and which one serves a cache."""

from __future__ import annotations

from typing import Protocol

import torch

from mm.engine.attention.gather import GatherAttention
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import Attention


class AttentionBackend(Attention, Protocol):
    """Attention over one KV cache."""

    cache: KVCache


def build_attention(cache: KVCache) -> AttentionBackend:
    """The fastest backend for the cache's device and dtype."""
    if cache.shape.device.type == "cpu" and cache.shape.dtype in (torch.float32, torch.bfloat16):
        from mm.engine.attention.cpu import CpuAttention

        return CpuAttention(cache)
    if cache.shape.device.type == "cuda":
        from mm.engine.attention.cuda import VarlenAttention, varlen_works

        if varlen_works(cache.shape):
            return VarlenAttention(cache)
    return GatherAttention(cache)
