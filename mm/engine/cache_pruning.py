"""What reducers of the decode stage take out of the cache once a prompt is in.

They see row counts and where visual rows are, and answer with rows that stay. A wrong answer is theirs: nothing is
evicted then, and the error names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_runner import Chunk
from mm.errors import MmError, ReducerFault
from mm.plugins.apply import plugin_errors
from mm.plugins.reducer import CacheView, InDecode


def evict(
    cache: KVCache, slot: int, prompt: Prompt, chunk: Chunk, evictors: Sequence[InDecode]
) -> tuple[int, MmError | None]:
    """Carry out what the evictors decide, one after the other: each sees what the one before it left.

    Args:
        chunk: The prompt's last one, which has just been through the decoder.

    Returns:
        How many of the prompt's first rows are untouched in every layer, and what went wrong: with the one that failed
        it ends, and what its answer named stays.
    """
    planes = _visual(cache.shape.num_layers, prompt, chunk)
    untouched = prompt.length
    for evictor in evictors:
        try:
            kept = _asked(evictor, cache.lengths[:, slot].tolist(), planes)
        except MmError as error:
            return untouched, error
        for layer, rows in kept.items():
            untouched = min(untouched, _num_leading(rows))
            cache.keep_tokens(slot, layer, rows)
            visual, origins = planes[layer]
            stays = torch.isin(visual, rows)
            planes[layer] = torch.searchsorted(rows, visual[stays]), origins[stays]
    return untouched, None


def _asked(evictor: InDecode, lengths: Sequence[int], planes: Sequence[tuple[Tensor, Tensor]]) -> Mapping[int, Tensor]:
    name = type(evictor).__name__
    view = CacheView(
        lengths=tuple(lengths), visual=tuple(rows for rows, _ in planes), origins=tuple(of for _, of in planes)
    )
    with plugin_errors(name, "when the prompt was in"):
        kept = evictor.prefill_done(view)
        _check(kept, lengths, name)
    return kept


def _visual(num_layers: int, prompt: Prompt, chunk: Chunk) -> list[tuple[Tensor, Tensor]]:
    """Per layer, which rows of the cache are visual and which of the prompt's visual rows these are: above a drop,
    those that it left.
    """
    here = prompt.is_visual.nonzero().squeeze(1)
    found, plane = [], (here, torch.arange(here.shape[0], device=here.device))
    before = prompt.length - chunk.num_rows
    for layer in range(num_layers):
        if chunk.drops is not None and layer in chunk.drops.left:
            visual, origins = chunk.drops.left[layer]
            plane = visual + before, origins
        found.append(plane)
    return found


def _check(kept: Mapping[int, Tensor], lengths: Sequence[int], name: str) -> None:
    if not isinstance(kept, Mapping):
        raise ReducerFault(name, "has to return a mapping of layers to the rows that stay")
    for layer, rows in kept.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(lengths):
            raise ReducerFault(name, f"names layer {layer!r}; there are 0..{len(lengths) - 1}")
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            raise ReducerFault(name, f"has to return an int64 vector of the rows that stay in layer {layer}")
        if rows.shape[0] == 0:
            raise ReducerFault(name, f"kept none of {lengths[layer]} rows in layer {layer}; at least one has to stay")
        inside = bool((rows[0] >= 0) & (rows[-1] < lengths[layer]))
        if not inside or not bool((rows[1:] > rows[:-1]).all()):
            raise ReducerFault(name, f"rows of layer {layer} are not strictly ascending within 0..{lengths[layer] - 1}")


def _num_leading(rows: Tensor) -> int:
    """How many rows stay where they are."""
    moved = (rows != torch.arange(rows.shape[0], device=rows.device)).nonzero()
    return int(moved[0]) if len(moved) else rows.shape[0]
