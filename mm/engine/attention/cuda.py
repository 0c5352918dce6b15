"""Attention over the paged KV cache on a GPU: torch's varlen attention, which reads block tables.

It is used where the installed torch has it and a small trial on the device agrees with `GatherAttention`. Draft trees
and bounded scores go through the latter, since varlen attention has causal masks only and no bound.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.data.arrays import to_tensor
from mm.engine.attention.gather import GatherAttention, split_qkv
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import PLAIN, AttentionMetadata, AttentionVariant, Rotary, rotate
from mm.models.kv_cache_spec import KVCacheSpec

log = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""Largest accepted difference of the trial's outputs, which are of order 1 and of half precision."""


@dataclass(kw_only=True)
class DeviceMetadata:
    """Block tables and slots of a step in every layer, on the device. W is the longest table.

    Attributes:
        query_start_loc: (C + 1,) int32, the first token of each chunk, and the end.
        block_tables: (num_layers, C, W) int32 block ids.
        seq_lens: (num_layers, C) int32, tokens that each chunk's sequence holds, the chunk included.
        slot_mapping: (num_layers, T) int64, the slots (block * block_size + offset) of the step's tokens.
        max_query_len: Tokens of the longest chunk.
        max_seq_len: At least the longest of `seq_lens`.
    """

    query_start_loc: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of(cls, cache: KVCache, metadata: AttentionMetadata) -> DeviceMetadata:
        """Built with one copy to the device per field, for all layers together."""
        size, active = cache.shape.block_size, metadata.query_lens > 0
        seq_indices, query_lens = metadata.seq_indices[active], metadata.query_lens[active]
        seq_lens = cache.lengths[:, seq_indices]
        width = max(1, cache.shape.num_blocks(int(seq_lens.max())))
        tables = cache.block_tables[:, seq_indices, :width]
        chunk = np.repeat(np.arange(len(seq_indices)), query_lens)
        starts = np.concatenate([[0], np.cumsum(query_lens)])
        # Layers above a pruning layer that is still to come have no slots yet; they are looked up again after it.
        token = np.maximum(0, seq_lens[:, chunk] + (np.arange(len(chunk)) - starts[1:][chunk]))
        blocks = np.take_along_axis(tables[:, chunk], (token // size)[..., None], axis=2)[..., 0].astype(np.int64)

        def upload(array: NDArray[Any], dtype: type[np.integer[Any]]) -> Tensor:
            return to_tensor(np.ascontiguousarray(array, dtype=dtype), cache.shape.device)

        return cls(
            query_start_loc=upload(starts, np.int32),
            block_tables=upload(tables, np.int32),
            seq_lens=upload(seq_lens, np.int32),
            slot_mapping=upload(blocks * size + token % size, np.int64),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
        )


class VarlenAttention(GatherAttention):
    """One kernel per layer for prefill and decode together. The host does nothing between two layers."""

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        metadata: AttentionMetadata,
        rotary: Rotary | None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        if metadata.masks or variant.softcap is not None:
            return super().attend(layer, qkv, metadata, rotary, variant)
        from torch.nn.attention.varlen import varlen_attn

        cache, device = self.cache, metadata.backend_state
        if not isinstance(device, DeviceMetadata):
            device = metadata.backend_state = DeviceMetadata.of(cache, metadata)
        query, key, value = split_qkv(qkv, cache.shape.num_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        cache.keys.flatten(0, 1).index_copy_(0, device.slot_mapping[layer], key)
        cache.values.flatten(0, 1).index_copy_(0, device.slot_mapping[layer], value)
        output = varlen_attn(
            query.contiguous(),
            cache.keys,
            cache.values,
            device.query_start_loc,
            None,  # type: ignore[arg-type]
            device.max_query_len,
            device.max_seq_len,
            window_size=(-1 if variant.window is None else variant.window - 1, 0),
            scale=variant.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            block_table=device.block_tables[layer],
            seqused_k=device.seq_lens[layer],
        )
        assert isinstance(output, Tensor)
        return output


@functools.cache
def varlen_works(shape: KVCacheSpec) -> bool:
    """Whether varlen attention with block tables exists and is right on this device. It is tried once."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        missing = {"block_table", "seqused_k"} - inspect.signature(varlen_attn).parameters.keys()
        if missing:
            log.info("varlen attention lacks %s; sequences are gathered instead", ", ".join(sorted(missing)))
            return False
        difference = _trial(shape)
    except Exception as error:
        log.info("varlen attention cannot be used here (%s); sequences are gathered instead", type(error).__name__)
        return False
    if not difference <= TOLERANCE:
        log.warning("varlen attention is off by %.3g here; sequences are gathered instead", difference)
        return False
    return True


def _trial(shape: KVCacheSpec) -> float:
    """Largest difference between both backends over a prefill and a decoding step of two sequences."""
    generator = torch.Generator(shape.device).manual_seed(0)
    width = 2 * shape.num_heads + 2 * shape.num_heads
    steps = [
        torch.randn(count, width, shape.head_dim, generator=generator, device=shape.device).to(shape.dtype)
        for count in (40, 2)
    ]
    found: list[Tensor] = []
    for backend in (VarlenAttention, GatherAttention):
        num_blocks = shape.num_layers * (shape.num_blocks(24) + shape.num_blocks(18))
        cache = KVCache(shape, num_blocks=num_blocks, max_num_seqs=2)
        attention, seqs = backend(cache), [cache.allocate(), cache.allocate()]
        outputs: list[Tensor] = []
        for qkv, counts in zip(steps, ([23, 17], [1, 1]), strict=True):
            for seq_index, count in zip(seqs, counts, strict=True):
                cache.append_slots(seq_index, count)
            outputs.append(attention.attend(0, qkv.clone(), AttentionMetadata.of(seqs, counts), None))
        found.append(torch.cat(outputs).float())
    return float((found[0] - found[1]).abs().max())
