"""Attention in plain torch: the reference of the other backends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import AttentionMetadata, Rotary, rotate


class GatherAttention:
    """Plain torch: gathers each sequence's rows out of the blocks. Runs everywhere and is the oracle of the others."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def attend(self, layer: int, rows: Tensor, batch: AttentionMetadata, rotary: Rotary | None) -> Tensor:
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

    def _write(self, layer: int, key: Tensor, value: Tensor, batch: AttentionMetadata) -> None:
        places = [
            self.cache.slot_mapping(layer, slot, int(self.cache.lengths[layer, slot]) - count)
            for slot, count in zip(batch.slots.tolist(), batch.counts.tolist(), strict=True)
        ]
        target = torch.from_numpy(np.concatenate(places)).to(key.device)
        self.cache.keys.flatten(0, 1)[target] = key
        self.cache.values.flatten(0, 1)[target] = value

    def _decode(self, layer: int, query: Tensor, batch: AttentionMetadata, chunks: list[int], output: Tensor) -> None:
        """All chunks of one row at once, padded to the longest."""
        cache, device = self.cache, query.device
        slots, firsts = batch.slots[chunks], torch.from_numpy(batch.firsts[chunks]).to(device)
        lengths = torch.from_numpy(cache.lengths[layer, slots]).to(device)
        width = cache.shape.num_blocks(int(cache.lengths[layer, slots].max()))
        tables = torch.from_numpy(cache.block_tables[layer, slots, :width].astype(np.int64)).to(device)
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
    cache: KVCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: AttentionMetadata,
    chunk: int,
    output: Tensor,
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
        places = torch.from_numpy(cache.slot_mapping(layer, slot)).to(query.device)
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
