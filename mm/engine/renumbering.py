"""Positions that begin anew in each layer in which visual tokens leave, as PyramidDrop and MustDrop were published.

A token's position in a layer is then its place among the tokens that the layer holds. It is read off the cache, whose
layers know how many they hold, so nothing has to be remembered: not through preemption, nor from one engine to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.data.arrays import to_tensor
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import PackedTokens
from mm.models.attention import Rotary
from mm.models.layers import DecoderLayers


def renumber(packed: PackedTokens, layer: int, cache: KVCache, model: DecoderLayers, rotary: Rotary) -> Rotary:
    """cos and sin for the tokens of a step in a layer, given those of the layer below.

    The cache has slots for the tokens in this layer.
    """
    if not packed.renumbers:
        return rotary
    parts: list[tuple[Tensor, Tensor]] = []
    decode = packed.decode
    if decode is not None and decode.renumbers:
        lengths = cache.lengths[layer, decode.seq_indices[list(decode.renumbers)]]
        parts.append((torch.tensor(decode.renumbers), to_tensor(lengths - 1, torch.device("cpu"))))
    for i, chunk in enumerate(packed.chunks):
        if chunk.renumbers:
            first, count = packed.span(i)
            offsets = torch.arange(count)
            if chunk.prune_state is None:  # drafts share positions
                offsets = (chunk.positions[0] - chunk.positions[0, 0]).cpu()
            parts.append(
                (torch.arange(first, first + count), int(cache.lengths[layer, chunk.seq_index]) - count + offsets)
            )
    device = rotary[0].device
    rows = torch.cat([rows for rows, _ in parts]).to(device)
    cos, sin = model.rotary(torch.cat([positions for _, positions in parts]).unsqueeze(0).to(device))
    return rotary[0].index_copy(0, rows, cos), rotary[1].index_copy(0, rows, sin)
