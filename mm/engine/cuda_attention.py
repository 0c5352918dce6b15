"""Attention over the block cache on a GPU: torch's varlen attention, which reads block tables.

Used where the installed torch has it and a small trial on the device agrees with `GatherAttention`; masks of draft
trees go through the latter, since varlen attention knows only causality.
"""

from __future__ import annotations

import functools
import inspect
import logging

import numpy as np
import torch
from torch import Tensor

from mm.engine.attention import GatherAttention, Rotary, RowBatch, rotate, split
from mm.engine.kv_cache import CacheShape, KVCache

log = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""Largest difference of the trial's outputs, which are of order 1 and half precision."""


class VarlenAttention(GatherAttention):
    """One call per layer for prompts and decoding rows together."""

    def attend(self, layer: int, rows: Tensor, batch: RowBatch, rotary: Rotary | None) -> Tensor:
        if batch.masks:
            return super().attend(layer, rows, batch, rotary)
        from torch.nn.attention.varlen import varlen_attn

        cache, device = self.cache, rows.device
        query, key, value = split(rows, cache.shape.num_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        self._write(layer, key, value, batch)
        active = batch.counts > 0
        slots, counts = batch.slots[active], batch.counts[active]
        lengths = cache.lengths[layer, slots]
        tables = cache.tables[layer, slots, : cache.shape.num_blocks(int(lengths.max()))]
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)).to(device)
        return varlen_attn(
            query.contiguous(),
            cache.keys,
            cache.values,
            starts,
            None,  # type: ignore[arg-type]
            int(counts.max()),
            int(lengths.max()),
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            block_table=torch.from_numpy(np.ascontiguousarray(tables)).to(device),
            seqused_k=torch.from_numpy(lengths.astype(np.int32)).to(device),
        )


@functools.cache
def varlen_works(shape: CacheShape) -> bool:
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


def _trial(shape: CacheShape) -> float:
    """Largest difference between both backends over a prompt and a decoding step of two sequences."""
    torch_seed = torch.Generator(shape.device).manual_seed(0)
    width = 2 * shape.num_heads + 2 * shape.num_heads
    steps = [
        torch.randn(count, width, shape.head_dim, generator=torch_seed, device=shape.device).to(shape.dtype)
        for count in (40, 2)
    ]
    found = []
    for backend in (VarlenAttention, GatherAttention):
        cache = KVCache(shape, num_blocks=8 * shape.num_layers, num_slots=2)
        attention, slots = backend(cache), [cache.open(), cache.open()]
        outputs = []
        for rows, counts in zip(steps, ([23, 17], [1, 1]), strict=True):
            for slot, count in zip(slots, counts, strict=True):
                cache.grow(slot, count)
            outputs.append(attention.attend(0, rows.clone(), RowBatch.of(slots, counts), None))
        found.append(torch.cat(outputs).float())
    return float((found[0] - found[1]).abs().max())
