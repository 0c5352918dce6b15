"""One pass of packed rows through the decoder: the only place that drives layers.

Chunks of different sequences share the pass: one row each of those that decode, many of those that prefill. Between two
layers a chunk's reducers may drop visual rows; its neighbours do not notice. Room in the cache is taken segment by
segment, so the layers above a drop never hold what was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mm.core.errors import ReducerFault
from mm.core.plugins import InPrefill
from mm.engine.attention import Attention, Rotary, RowBatch
from mm.engine.kv_cache import KVCache


class Layers(Protocol):
    """What a pass asks of a language model."""

    num_layers: int

    def rotary(self, positions: Tensor) -> Rotary: ...

    def layer(self, index: int, hidden: Tensor, batch: RowBatch, rotary: Rotary, attention: Attention) -> Tensor: ...

    def queries_keys(self, index: int, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(kw_only=True)
class Drops:
    """Where a chunk loses visual rows.

    Attributes:
        hooks: Layer to the reducer that is asked at its input.
        visual: (V,) int64, rows of the chunk that are visual; kept up to date.
        origins: (V,) int64, which of the prompt's visual rows these are; kept up to date.
        visual_from: Layer to what `visual` became there, for layers in which rows were dropped.
    """

    hooks: Mapping[int, InPrefill]
    visual: Tensor
    origins: Tensor
    visual_from: dict[int, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Chunk:
    """Consecutive new rows of one sequence.

    Attributes:
        embeddings: (n, D).
        positions: (P, n).
        num_logits: Logits wanted of the last so many rows.
        mask: (n, n) bool for draft trees; None is causal.
        drops: For a whole prompt whose reducers act inside the decoder.
        error: What its reducer did wrong; its rows went on undropped.
    """

    slot: int
    embeddings: Tensor
    positions: Tensor
    num_logits: int = 1
    mask: Tensor | None = None
    drops: Drops | None = None
    error: ReducerFault | None = field(default=None, init=False)

    @property
    def num_rows(self) -> int:
        return self.embeddings.shape[0]


class Pass:
    """Drives chunks through all layers.

    Args:
        layers: The language model.
        attention: Backend over the cache in which the chunks' slots are.
    """

    def __init__(self, layers: Layers, attention: Attention) -> None:
        self._layers, self._attention = layers, attention
        self.cache: KVCache = attention.cache

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits (sum of num_logits, vocab), chunk after chunk. The cache has room for every row in every layer."""
        drops = any(chunk.drops for chunk in chunks)
        return self._layers.logits(self._run_dropping(chunks) if drops else self._run_plain(chunks))

    def _run_plain(self, chunks: Sequence[Chunk]) -> Tensor:
        for chunk in chunks:
            self.cache.grow(chunk.slot, chunk.num_rows)
        batch = _batch(chunks, [chunk.num_rows for chunk in chunks])
        hidden = _cat([chunk.embeddings for chunk in chunks])
        rotary = self._layers.rotary(_positions(chunks))
        for index in range(self._layers.num_layers):
            hidden = self._layers.layer(index, hidden, batch, rotary, self._attention)
        return _logit_rows(hidden, chunks, batch)

    def _run_dropping(self, chunks: Sequence[Chunk]) -> Tensor:
        layers, num_layers = self._layers, self._layers.num_layers
        counts = [chunk.num_rows for chunk in chunks]
        borders = [sorted(chunk.drops.hooks) if chunk.drops else [] for chunk in chunks]
        for chunk, border in zip(chunks, borders, strict=True):
            self.cache.grow(chunk.slot, chunk.num_rows, 0, (*border, num_layers)[0])
        batch = _batch(chunks, counts)
        hidden = _cat([chunk.embeddings for chunk in chunks])
        rotary = layers.rotary(_positions(chunks))
        before = hidden
        for index in range(num_layers):
            at = [i for i, border in enumerate(borders) if index in border]
            if at:
                kept = []
                for i, chunk in enumerate(chunks):
                    first = int(batch.firsts[i])
                    rows = torch.arange(first, first + counts[i], device=hidden.device)
                    if i in at:
                        mine = slice(first, first + counts[i])
                        view = PrefillView(self, chunk, index, hidden[mine], before[mine], _part(rotary, mine))
                        rows = rows[_ask(chunk, index, view)]
                        counts[i] = rows.shape[0]
                        stop = next((b for b in borders[i] if b > index), num_layers)
                        self.cache.grow(chunk.slot, counts[i], index, stop)
                    kept.append(rows)
                rows = torch.cat(kept)
                hidden, rotary = hidden[rows], (rotary[0][rows], rotary[1][rows])
                batch = _batch(chunks, counts)
            before = hidden
            hidden = layers.layer(index, hidden, batch, rotary, self._attention)
        return _logit_rows(hidden, chunks, batch)


class PrefillView:
    """What a reducer sees of one prompt at the input of a layer.

    Attributes:
        layer: The layer about to run.
        hidden: (n, D), the prompt's rows that are left.
        visual: (V,) int64, which of these rows are visual.
        origins: (V,) int64, which of the prompt's visual rows these are, counted over all its items.
    """

    def __init__(self, owner: Pass, chunk: Chunk, layer: int, hidden: Tensor, before: Tensor, rotary: Rotary) -> None:
        assert chunk.drops is not None
        self.layer, self.hidden = layer, hidden
        self.visual, self.origins = chunk.drops.visual, chunk.drops.origins
        self._owner, self._slot, self._before, self._rotary = owner, chunk.slot, before, rotary

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    def attention_rows(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """Attention of a few rows to the visual ones, without a full map.

        The softmax is over everything a row sees, in float32; then the visual columns are cut out.

        Args:
            rows: (r,) int64 indices of prompt rows.
            layer: This layer (the default), about to run, or the one that has just run.

        Returns:
            (H, r, V) float32.
        """
        layer = self.layer if layer is None else layer
        if layer not in (self.layer, self.layer - 1):
            raise ReducerFault("attention_rows", f"asks for layer {layer} at the input of layer {self.layer}")
        index, source = layer, self.hidden if layer == self.layer else self._before
        cos, sin = self._rotary
        query, _ = self._owner._layers.queries_keys(index, source[rows], (cos[rows], sin[rows]))
        keys = self._keys(index, source)
        earlier = keys.shape[0] - self.num_rows
        heads, width = query.shape[1], query.shape[2]
        grouped = query.float().view(rows.shape[0], keys.shape[1], heads // keys.shape[1], width)
        scores = torch.einsum("rkgd,skd->kgrs", grouped, keys.float()).flatten(0, 1) * width**-0.5
        seen = torch.arange(keys.shape[0], device=rows.device) <= rows[:, None] + earlier
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)[..., self.visual + earlier]

    def keys(self) -> Tensor:
        """(n, H_kv, d): this layer's rotated keys of the prompt's rows."""
        return self._keys(self.layer, self.hidden)[-self.num_rows :]

    def _keys(self, layer: int, source: Tensor) -> Tensor:
        """Every key the prompt's rows see: those of a prefix that the cache held before come first."""
        cache = self._owner.cache
        held = int(cache.lengths[layer, self._slot])
        places = torch.from_numpy(cache.places(layer, self._slot)).to(source.device)
        earlier = cache.keys.flatten(0, 1)[places] if held else source.new_empty(0, *cache.keys.shape[2:])
        if layer < self.layer:
            return earlier
        return torch.cat([earlier, self._owner._layers.queries_keys(layer, source, self._rotary)[1]])


def _ask(chunk: Chunk, layer: int, view: PrefillView) -> Tensor:
    """(n',) int64: the rows that stay, ascending. A reducer that fails costs its own chunk, and nobody else."""
    drops = chunk.drops
    assert drops is not None
    everything = torch.arange(view.num_rows, device=view.hidden.device)
    if not drops.visual.shape[0] or chunk.error is not None:
        return everything
    reducer = drops.hooks[layer]
    name = type(reducer).__name__
    try:
        keep = reducer.in_prefill(layer, view)
        _check_keep(keep, drops.visual.shape[0], name)
    except ReducerFault as error:
        chunk.error = error
        return everything
    except Exception as error:
        chunk.error = ReducerFault(name, f"failed at layer {layer}: {type(error).__name__}: {error}")
        return everything
    stays = torch.ones(view.num_rows, dtype=torch.bool, device=view.hidden.device)
    stays[drops.visual] = False
    stays[drops.visual[keep]] = True
    rows = everything[stays]
    place = torch.cumsum(stays, 0) - 1
    drops.visual, drops.origins = place[drops.visual[keep]], drops.origins[keep]
    drops.visual_from[layer] = drops.visual
    return rows


def _check_keep(keep: Tensor, num_visual: int, name: str) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.int64 or keep.dim() != 1:
        raise ReducerFault(name, "has to return an int64 vector of kept visual rows")
    if keep.shape[0] == 0:
        raise ReducerFault(name, f"kept none of {num_visual} tokens; at least one has to stay")
    inside = bool((keep[0] >= 0) & (keep[-1] < num_visual))
    if not inside or not bool((keep[1:] > keep[:-1]).all()):
        raise ReducerFault(name, f"kept rows are not strictly ascending within 0..{num_visual - 1}")


def _batch(chunks: Sequence[Chunk], counts: Sequence[int]) -> RowBatch:
    masks = {i: chunk.mask for i, chunk in enumerate(chunks) if chunk.mask is not None}
    return RowBatch.of([chunk.slot for chunk in chunks], counts, masks)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _positions(chunks: Sequence[Chunk]) -> Tensor:
    """(P, R): as many rows as the chunk that has most of them; the others repeat theirs."""
    rows = max(chunk.positions.shape[0] for chunk in chunks)
    return (
        _cat([chunk.positions.expand(rows, -1) for chunk in chunks])
        if len(chunks) == 1
        else torch.cat([chunk.positions.expand(rows, -1) for chunk in chunks], dim=1)
    )


def _part(rotary: Rotary, rows: slice) -> Rotary:
    return rotary[0][rows], rotary[1][rows]


def _logit_rows(hidden: Tensor, chunks: Sequence[Chunk], batch: RowBatch) -> Tensor:
    wanted = [
        np.arange(first + count - min(chunk.num_logits, count), first + count)
        for chunk, first, count in zip(chunks, batch.firsts.tolist(), batch.counts.tolist(), strict=True)
    ]
    rows = np.concatenate(wanted)
    if len(rows) == hidden.shape[0]:
        return hidden
    return hidden[torch.from_numpy(rows).to(hidden.device)]
