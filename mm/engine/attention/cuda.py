"""Attention over the block cache on a GPU: torch's varlen attention, which reads block tables.

Used where the installed torch has it and a small trial on the device agrees with `GatherAttention`; masks of draft
trees go through the latter, since varlen attention knows only causality.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.engine.attention.gather import GatherAttention, split
from mm.engine.kv_cache.blocks import KVCache
from mm.models.attention import AttentionMetadata, Rotary, rotate
from mm.models.kv_cache_spec import KVCacheSpec

log = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""Largest difference of the trial's outputs, which are of order 1 and half precision."""


@dataclass(kw_only=True)
class Places:
    """Where the rows of a batch are in the cache of every layer, on the device; W is the longest table.

    Attributes:
        starts: (C + 1,) int32, first row of each chunk, and the end.
        tables: (num_layers, C, W) int32, block ids.
        lengths: (num_layers, C) int32, rows that each chunk's sequence holds, its own included.
        targets: (num_layers, R) int64, the places (block * block_size + row) of the batch's own rows.
        most_rows: Of a chunk.
        most_length: At least the longest of `lengths`.
    """

    starts: Tensor
    tables: Tensor
    lengths: Tensor
    targets: Tensor
    most_rows: int
    most_length: int

    @classmethod
    def of(cls, cache: KVCache, batch: AttentionMetadata) -> Places:
        """One copy to the device per field, for all layers together."""
        size, active = cache.shape.block_size, batch.counts > 0
        slots, counts = batch.slots[active], batch.counts[active]
        lengths = cache.lengths[:, slots]
        width = max(1, cache.shape.num_blocks(int(lengths.max())))
        tables = cache.block_tables[:, slots, :width]
        chunk = np.repeat(np.arange(len(slots)), counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Layers above a drop that is still to come have no room yet; their places are asked for again behind it.
        row = np.maximum(0, lengths[:, chunk] + (np.arange(len(chunk)) - starts[1:][chunk]))
        blocks = np.take_along_axis(tables[:, chunk], (row // size)[..., None], axis=2)[..., 0].astype(np.int64)
        device = cache.shape.device

        def upload(array: np.ndarray, dtype: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device)

        return cls(
            starts=upload(starts, np.int32),
            tables=upload(tables, np.int32),
            lengths=upload(lengths, np.int32),
            targets=upload(blocks * size + row % size, np.int64),
            most_rows=int(counts.max()),
            most_length=int(lengths.max()),
        )


class VarlenAttention(GatherAttention):
    """One call per layer for prompts and decoding rows together; nothing is asked of the host between layers."""

    def attend(self, layer: int, rows: Tensor, batch: AttentionMetadata, rotary: Rotary | None) -> Tensor:
        if batch.masks:
            return super().attend(layer, rows, batch, rotary)
        from torch.nn.attention.varlen import varlen_attn

        cache = self.cache
        places = batch.places = batch.places or Places.of(cache, batch)
        query, key, value = split(rows, cache.shape.num_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        cache.keys.flatten(0, 1).index_copy_(0, places.targets[layer], key)
        cache.values.flatten(0, 1).index_copy_(0, places.targets[layer], value)
        return varlen_attn(
            query.contiguous(),
            cache.keys,
            cache.values,
            places.starts,
            None,  # type: ignore[arg-type]
            places.most_rows,
            places.most_length,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            block_table=places.tables[layer],
            seqused_k=places.lengths[layer],
        )


@functools.cache
def varlen_works(shape: KVCacheSpec) -> bool:
    """Whether varlen attention with block tables is there and right on this device; tried once."""
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
    """Largest difference between both backends over a prompt and a decoding step of two sequences."""
    torch_seed = torch.Generator(shape.device).manual_seed(0)
    width = 2 * shape.num_heads + 2 * shape.num_heads
    steps = [
        torch.randn(count, width, shape.head_dim, generator=torch_seed, device=shape.device).to(shape.dtype)
        for count in (40, 2)
    ]
    found = []
    for backend in (VarlenAttention, GatherAttention):
        num_blocks = shape.num_layers * (shape.num_blocks(24) + shape.num_blocks(18))
        cache = KVCache(shape, num_blocks=num_blocks, num_slots=2)
        attention, slots = backend(cache), [cache.allocate(), cache.allocate()]
        outputs = []
        for rows, counts in zip(steps, ([23, 17], [1, 1]), strict=True):
            for slot, count in zip(slots, counts, strict=True):
                cache.append_slots(slot, count)
            outputs.append(attention.attend(0, rows.clone(), AttentionMetadata.of(slots, counts), None))
        found.append(torch.cat(outputs).float())
    return float((found[0] - found[1]).abs().max())
