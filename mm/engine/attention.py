"""Attention of packed rows over the block cache: one interface, one backend per kind of device.

A step's rows lie one sequence behind the other in `RowBatch`; decoding sequences bring one row, prompts many, draft
trees a few with a mask of their own. `attend` writes their keys and values behind those that the cache holds and
returns what each row sees: every earlier row of its sequence, whatever their positions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mm.engine.kv_cache import KVCache

ATTENTION = "mm_engine"
Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (R, rotated width) float32."""


@dataclass(kw_only=True)
class RowBatch:
    """Which sequences a layer's rows belong to. Room for them in the cache was made before.

    Attributes:
        slots: (C,) int64, the cache slot of each chunk.
        firsts, counts: (C,) int64, the first row and the number of rows of each chunk.
        masks: Chunk to (count, count) bool: which of the chunk's rows each one sees, itself included. A chunk that is
            not named is causal. All rows see all that was in the cache before.
        places: What a backend worked out from these, once for all layers.
    """

    slots: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    masks: dict[int, Tensor] = field(default_factory=dict)
    places: Any = None

    @classmethod
    def of(cls, slots: Sequence[int], counts: Sequence[int], masks: dict[int, Tensor] | None = None) -> RowBatch:
        """Chunks one behind the other."""
        sizes = np.asarray(counts, dtype=np.int64)
        firsts = np.cumsum(sizes) - sizes
        return cls(slots=np.asarray(slots, dtype=np.int64), firsts=firsts, counts=sizes, masks=masks or {})

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())


class Attention(Protocol):
    """A backend over one cache."""

    cache: KVCache

    def attend(self, layer: int, rows: Tensor, batch: RowBatch, rotary: Rotary | None) -> Tensor:
        """Append to the cache and attend.

        Args:
            rows: (R, H + 2 * H_kv, d): queries, keys and values of each row; may be overwritten.
            rotary: Applied to queries and keys; None where that was done already.

        Returns:
            (R, H, d).
        """
        ...


def build_attention(cache: KVCache) -> Attention:
    """The fastest backend for the cache's device and dtype."""
    if cache.shape.device.type == "cpu" and cache.shape.dtype in (torch.float32, torch.bfloat16):
        from mm.engine.cpu_attention import CpuAttention

        return CpuAttention(cache)
    if cache.shape.device.type == "cuda":
        from mm.engine.cuda_attention import VarlenAttention, varlen_works

        if varlen_works(cache.shape):
            return VarlenAttention(cache)
    return GatherAttention(cache)


class GatherAttention:
    """Plain torch: gathers each sequence's rows out of the blocks. Runs everywhere and is the oracle of the others."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def attend(self, layer: int, rows: Tensor, batch: RowBatch, rotary: Rotary | None) -> Tensor:
        query, key, value = split(rows, self.cache.shape.num_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        self._write(layer, key, value, batch)
        output = torch.empty_like(query)
        singles = [i for i, count in enumerate(batch.counts.tolist()) if count == 1]
        if len(singles) > 1:
            self._decode(layer, query, batch, singles, output)
        for i, count in enumerate(batch.counts.tolist()):
            if count and not (count == 1 and len(singles) > 1):
                prompt_attend(self.cache, layer, query, key, value, batch, i, output)
        return output

    def _write(self, layer: int, key: Tensor, value: Tensor, batch: RowBatch) -> None:
        places = [
            self.cache.places(layer, slot, int(self.cache.lengths[layer, slot]) - count)
            for slot, count in zip(batch.slots.tolist(), batch.counts.tolist(), strict=True)
        ]
        target = torch.from_numpy(np.concatenate(places)).to(key.device)
        self.cache.keys.flatten(0, 1)[target] = key
        self.cache.values.flatten(0, 1)[target] = value

    def _decode(self, layer: int, query: Tensor, batch: RowBatch, chunks: list[int], output: Tensor) -> None:
        """All chunks of one row at once, padded to the longest."""
        cache, device = self.cache, query.device
        slots, firsts = batch.slots[chunks], torch.from_numpy(batch.firsts[chunks]).to(device)
        lengths = torch.from_numpy(cache.lengths[layer, slots]).to(device)
        width = cache.shape.num_blocks(int(cache.lengths[layer, slots].max()))
        tables = torch.from_numpy(cache.tables[layer, slots, :width].astype(np.int64)).to(device)
        # Unused table entries name some block: its rows are masked, and finite zeros keep them out of the sums.
        seen = torch.arange(width * cache.shape.block_size, device=device) < lengths[:, None]
        keys, values = (pool[tables].flatten(1, 2) for pool in (cache.keys, cache.values))
        values = values.masked_fill(~seen[:, :, None, None], 0)
        keys = keys.masked_fill(~seen[:, :, None, None], 0)
        output[firsts] = nn.functional.scaled_dot_product_attention(
            query[firsts].unsqueeze(2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=True,
        ).squeeze(2)


def prompt_attend(
    cache: KVCache, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RowBatch, chunk: int, output: Tensor
) -> None:
    """Attention of one chunk of several rows into `output`; its keys and values are in the cache already.

    Args:
        query, key, value: (R, heads, d) of all packed rows.
    """
    slot, first, count = int(batch.slots[chunk]), int(batch.firsts[chunk]), int(batch.counts[chunk])
    length = int(cache.lengths[layer, slot])
    mine = slice(first, first + count)
    queries = query[mine].transpose(0, 1).unsqueeze(0)
    mask = batch.masks.get(chunk)
    if length == count:
        keys, values = key[mine], value[mine]
    else:
        places = torch.from_numpy(cache.places(layer, slot)).to(query.device)
        keys, values = (pool.flatten(0, 1)[places] for pool in (cache.keys, cache.values))
    causal = mask is None and length == count
    output[mine] = (
        nn.functional.scaled_dot_product_attention(
            queries,
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=None if causal else seen_rows(length, count, mask, query.device),
            is_causal=causal,
            enable_gqa=True,
        )
        .squeeze(0)
        .transpose(0, 1)
    )


def seen_rows(length: int, count: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(count, length) bool: all earlier rows, and of the last `count` those that `mask` or causality allows."""
    own = torch.ones(count, count, dtype=torch.bool, device=device).tril() if mask is None else mask.to(device)
    earlier = torch.ones(count, length - count, dtype=torch.bool, device=device)
    return torch.cat([earlier, own], dim=1)


def split(rows: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, H + 2 * H_kv, d) to queries, keys and values."""
    return rows.split([rows.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)  # type: ignore[return-value]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the halves form (RoFormer, eq. 34), on (R, heads, d).

    The first 2 * w columns are turned, where w is half of the width of `cos`; the rest stays.
    """
    width = cos.shape[-1]
    turned = states[..., :width].float()
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    turned = (turned * cos[:, None] + half * sin[:, None]).to(states.dtype)
    return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], dim=-1)


def attend_in_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mm_attention: Attention,
    mm_batch: RowBatch,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' own layers call: (1, heads, R, d) queries, keys and values, rotated already."""
    rows = torch.cat([query, key, value], dim=1).squeeze(0).transpose(0, 1).contiguous()
    layer: int = module.layer_idx  # type: ignore[assignment]
    return mm_attention.attend(layer, rows, mm_batch, None).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend_in_layer)
