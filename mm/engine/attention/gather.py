"""Attention in plain torch. It runs on every device, and the other backends are tested against it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mm.data.arrays import IntArray, to_tensor
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import PLAIN, AttentionMetadata, AttentionVariant, Rotary, rotate


class GatherAttention:
    """Gathers each sequence's keys and values out of the blocks, and attends with torch."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        metadata: AttentionMetadata,
        rotary: Rotary | None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        query, key, value = split_qkv(qkv, self.cache.shape.num_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        self._write(layer, key, value, metadata)
        output = torch.empty_like(query)
        lens: list[int] = metadata.query_lens.tolist()
        singles = [i for i, count in enumerate(lens) if count == 1]
        if len(singles) > 1:
            self._decode(layer, query, metadata, singles, output, variant)
        for i, count in enumerate(lens):
            if count and not (count == 1 and len(singles) > 1):
                prefill_attend(self.cache, layer, query, key, value, metadata, i, output, variant)
        return output

    def _write(self, layer: int, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> None:
        slots = [
            self.cache.slot_mapping(layer, seq_index, int(self.cache.lengths[layer, seq_index]) - count)
            for seq_index, count in zip(metadata.seq_indices.tolist(), metadata.query_lens.tolist(), strict=True)
        ]
        target = to_tensor(np.concatenate(slots), key.device)
        self.cache.keys.flatten(0, 1)[target] = key
        self.cache.values.flatten(0, 1)[target] = value

    def _decode(
        self,
        layer: int,
        query: Tensor,
        metadata: AttentionMetadata,
        chunks: list[int],
        output: Tensor,
        variant: AttentionVariant,
    ) -> None:
        """Attention of all chunks of one token at once, padded to the longest sequence."""
        cache, device = self.cache, query.device
        seq_indices, starts = metadata.seq_indices[chunks], to_tensor(metadata.query_starts[chunks], device)
        seq_lens: IntArray = cache.lengths[layer, seq_indices]
        width = cache.shape.num_blocks(int(seq_lens.max()))
        tables = to_tensor(cache.block_tables[layer, seq_indices, :width].astype(np.int64), device)
        # Unused table entries name some block. Its tokens are masked, and finite zeros keep them out of the sums.
        at = torch.arange(width * cache.shape.block_size, device=device)
        is_held = at < to_tensor(seq_lens, device)[:, None]
        if variant.window is not None:
            is_held &= at >= to_tensor(seq_lens, device)[:, None] - variant.window
        keys, values = (pool[tables].flatten(1, 2) for pool in (cache.keys, cache.values))
        values = values.masked_fill(~is_held[:, :, None, None], 0)
        keys = keys.masked_fill(~is_held[:, :, None, None], 0)
        mask = is_held[:, None, None]
        heads = query[starts].unsqueeze(2), keys.transpose(1, 2), values.transpose(1, 2)
        output[starts] = scaled_attention(*heads, mask, variant).squeeze(2)


def prefill_attend(
    cache: KVCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: AttentionMetadata,
    chunk: int,
    output: Tensor,
    variant: AttentionVariant = PLAIN,
) -> None:
    """Attention of one chunk of several tokens, written to `output`. Its keys and values are in the cache already.

    Args:
        query, key, value: (T, heads, d) of all tokens of the step.
        output: (T, H, d).
    """
    seq_index, start = int(metadata.seq_indices[chunk]), int(metadata.query_starts[chunk])
    count, seq_len = int(metadata.query_lens[chunk]), int(cache.lengths[layer, seq_index])
    own = slice(start, start + count)
    queries = query[own].transpose(0, 1).unsqueeze(0)
    mask = metadata.masks.get(chunk)
    if seq_len == count:
        keys, values = key[own], value[own]
    else:
        slots = to_tensor(cache.slot_mapping(layer, seq_index), query.device)
        keys, values = (pool.flatten(0, 1)[slots] for pool in (cache.keys, cache.values))
    causal = mask is None and seq_len == count and (variant.window is None or count <= variant.window)
    allowed = None if causal else attention_mask(seq_len, count, mask, query.device, variant.window)
    heads = queries, keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    output[own] = scaled_attention(*heads, allowed, variant).squeeze(0).transpose(0, 1)


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, variant: AttentionVariant
) -> Tensor:
    """Attention of (B, H, n, d) to (B, H_kv, m, d) as a layer defines it. Without a mask it is causal."""
    if variant.softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=variant.scale, enable_gqa=True
        )
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if variant.scale is None else variant.scale)
    scores = variant.softcap * torch.tanh(scores / variant.softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value


def attention_mask(
    seq_len: int, count: int, mask: Tensor | None, device: torch.device, window: int | None = None
) -> Tensor:
    """(count, seq_len) bool: all earlier tokens, and those of the last `count` that `mask` or causality allows.

    Args:
        window: Tokens that a token sees, itself included. The tokens before one in a draft tree are its ancestors.
    """
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    own = causal if mask is None else mask.to(device)
    earlier = torch.ones(count, seq_len - count, dtype=torch.bool, device=device)
    allowed = torch.cat([earlier, own], dim=1)
    if window is None:
        return allowed
    at = seq_len - count - 1 + (own & causal).sum(dim=1)
    every = torch.cat([torch.arange(seq_len - count, device=device), at])
    return allowed & (every > at[:, None] - window)


def split_qkv(qkv: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H + 2 * H_kv, d) to queries, keys and values."""
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    return (
        qkv[:, :num_heads],
        qkv[:, num_heads : num_heads + num_kv_heads],
        qkv[:, num_heads + num_kv_heads :],
    )
