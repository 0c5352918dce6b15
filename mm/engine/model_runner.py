"""One pass of packed rows through the decoder: the only place that drives layers.

Chunks of different sequences share the pass: one row each of those that decode, many of those that prefill. Between two
layers a chunk's reducers may drop visual rows; its neighbours do not notice. Room in the cache is taken segment by
segment, so the layers above a drop never hold what was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mm.engine.attention.base import AttentionBackend
from mm.engine.kv_cache.blocks import KVCache
from mm.errors import MmError, ReducerFault
from mm.models.attention import AttentionMetadata, Rotary
from mm.models.layers import DecoderLayers
from mm.plugins.apply import plugin_errors
from mm.plugins.reducer import InPrefill

if TYPE_CHECKING:
    from mm.engine.attention.cuda_graphs import DecodeGraphs


LAST_HIDDEN = "last_hidden"
"""The state behind the final norm, from which the head makes logits. "hidden:3" is the input of layer 3."""


@dataclass(kw_only=True)
class PruneState:
    """Where a chunk loses visual rows.

    Attributes:
        hooks: Layer to the reducer that is asked at its input.
        visual: (V,) int64, rows of the chunk that are visual; kept up to date.
        origins: (V,) int64, which of the prompt's visual rows these are; kept up to date.
        items: (all visual rows of the prompt,) int64, which item each belongs to.
        protected: (all visual rows of the prompt,) bool, those that an earlier stage wants kept.
        left: Layer to what `visual` and `origins` became there, for layers in which rows were dropped.
    """

    hooks: Mapping[int, InPrefill]
    visual: Tensor
    origins: Tensor
    items: Tensor
    protected: Tensor
    left: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Chunk:
    """Consecutive new rows of one sequence.

    Attributes:
        embeddings: (n, D).
        positions: (P, n).
        num_logits: Logits wanted of the last so many rows.
        mask: (n, n) bool for draft trees; None is causal.
        drops: For a whole prompt whose reducers act inside the decoder.
        watch: States to hand out: `LAST_HIDDEN`, or "hidden:" and a layer.
        error: What its reducer did wrong; its rows went on undropped.
        states: After the pass, name to (k, D).
        left: (k,) int64, the rows that these are of: those that no reducer dropped; None where nothing is watched.
    """

    slot: int
    embeddings: Tensor
    positions: Tensor
    num_logits: int = 1
    mask: Tensor | None = None
    drops: PruneState | None = None
    watch: frozenset[str] = frozenset()
    error: MmError | None = field(default=None, init=False)
    states: dict[str, Tensor] = field(default_factory=dict, init=False)
    left: Tensor | None = field(default=None, init=False)

    @property
    def num_rows(self) -> int:
        return self.embeddings.shape[0]


@dataclass(kw_only=True)
class DecodeBatch:
    """One new row of each of many sequences; logits are wanted of all.

    Attributes:
        slots: (B,) int64.
        embeddings: (B, D).
        positions: (1, B).
        watch: States to hand out, as of a chunk.
        states: After the pass, name to (B, D).
    """

    slots: np.ndarray
    embeddings: Tensor
    positions: Tensor
    watch: frozenset[str] = frozenset()
    states: dict[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def num_rows(self) -> int:
        return len(self.slots)


class ModelRunner:
    """Drives chunks through all layers.

    Args:
        layers: The language model.
        attention: Backend over the cache in which the chunks' slots are.
        graphs: Recorded steps for passes in which every sequence decodes.
    """

    def __init__(self, layers: DecoderLayers, attention: AttentionBackend, graphs: DecodeGraphs | None = None) -> None:
        self._layers, self._attention, self._graphs = layers, attention, graphs
        self.cache: KVCache = attention.cache

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], decoding: DecodeBatch | None = None) -> Tensor:
        """Logits (n, vocab): of the decoding rows, then of each chunk. The cache has room for all of them."""
        rows = _Packed(chunks, decoding)
        if decoding is not None:
            self.cache.append_slot_each(decoding.slots)
            if self._graphs is not None and not chunks and not decoding.watch:
                logits = self._graphs.run(decoding.slots, decoding.embeddings, decoding.positions)
                if logits is not None:
                    return logits
        drops = any(chunk.drops for chunk in chunks)
        return self._layers.logits(self._run_dropping(rows) if drops else self._run_plain(rows))

    def _run_plain(self, rows: _Packed) -> Tensor:
        for chunk in rows.chunks:
            self.cache.append_slots(chunk.slot, chunk.num_rows)
        hidden, batch = rows.embeddings, rows.batch()
        rotary = self._layers.rotary(rows.positions)
        for index in range(self._layers.num_layers):
            rows.watch(f"hidden:{index}", hidden)
            hidden = self._layers.layer(index, hidden, batch, rotary, self._attention)
        return self._finish(rows, hidden)

    def _finish(self, rows: _Packed, hidden: Tensor) -> Tensor:
        rows.hand_out_states(hidden, self._layers)
        return rows.with_logits(hidden)

    def _run_dropping(self, rows: _Packed) -> Tensor:
        layers, num_layers = self._layers, self._layers.num_layers
        borders = [sorted(chunk.drops.hooks) if chunk.drops else [] for chunk in rows.chunks]
        for chunk, border in zip(rows.chunks, borders, strict=True):
            self.cache.append_slots(chunk.slot, chunk.num_rows, 0, (*border, num_layers)[0])
        hidden, batch = rows.embeddings, rows.batch()
        rotary = layers.rotary(rows.positions)
        before = hidden
        for index in range(num_layers):
            asked = {i: border for i, border in enumerate(borders) if index in border}
            if asked:
                kept = [torch.arange(rows.num_decoding, device=hidden.device)]
                for i, chunk in enumerate(rows.chunks):
                    first, count = rows.place(i)
                    mine = slice(first, first + count)
                    stay = torch.arange(first, first + count, device=hidden.device)
                    if i in asked:
                        part = rotary[0][mine], rotary[1][mine]
                        view = PrefillView(self, chunk, index, hidden[mine], before[mine], part)
                        stay = stay[_ask(chunk, index, view)]
                        stop = next((border for border in asked[i] if border > index), num_layers)
                        self.cache.append_slots(chunk.slot, stay.shape[0], index, stop)
                    kept.append(stay)
                rows.counts = [part.shape[0] for part in kept[1:]]
                indices = torch.cat(kept)
                hidden, rotary = hidden[indices], (rotary[0][indices], rotary[1][indices])
                rows.drop(indices)
                batch = rows.batch()
            before = hidden
            rows.watch(f"hidden:{index}", hidden)
            hidden = layers.layer(index, hidden, batch, rotary, self._attention)
        return self._finish(rows, hidden)


class _Packed:
    """The rows of a pass, decoding ones first, then chunk after chunk.

    Attributes:
        counts: Rows that each chunk still has.
    """

    def __init__(self, chunks: Sequence[Chunk], decoding: DecodeBatch | None) -> None:
        self.chunks, self.num_decoding = chunks, decoding.num_rows if decoding else 0
        self.counts = [chunk.num_rows for chunk in chunks]
        self._decoding = decoding
        self._watched = frozenset[str]().union(decoding.watch if decoding else (), *(chunk.watch for chunk in chunks))
        self._states: dict[str, Tensor] = {}
        self._left: Tensor | None = None  # row of its chunk that each row was, once some were dropped
        parts = [decoding.embeddings] if decoding else []
        self.embeddings = _cat([*parts, *(chunk.embeddings for chunk in chunks)], 0)
        places = [decoding.positions] if decoding else []
        places += [chunk.positions for chunk in chunks]
        axes = max(part.shape[0] for part in places)
        self.positions = _cat([part.expand(axes, -1) for part in places], 1)

    def batch(self) -> AttentionMetadata:
        before = self._decoding.slots if self._decoding else np.zeros(0, dtype=np.int64)
        slots = np.concatenate([before, np.array([chunk.slot for chunk in self.chunks], dtype=np.int64)])
        counts = np.concatenate([np.ones(len(before), dtype=np.int64), np.array(self.counts, dtype=np.int64)])
        masks = {len(before) + i: c.mask for i, c in enumerate(self.chunks) if c.mask is not None}
        return AttentionMetadata(
            seq_indices=slots, query_starts=np.cumsum(counts) - counts, query_lens=counts, masks=masks
        )

    def watch(self, name: str, hidden: Tensor) -> None:
        """Keep a state of all rows, if somebody wants it."""
        if name in self._watched:
            self._states[name] = hidden

    def drop(self, indices: Tensor) -> None:
        """Keep only some rows of what is watched, as of everything else."""
        if self._watched:
            if self._left is None:
                self._left = torch.cat(
                    [torch.arange(n) for n in (self.num_decoding, *(c.num_rows for c in self.chunks))]
                )
            self._left = self._left[indices.cpu()]
            self._states = {name: state[indices] for name, state in self._states.items()}

    def hand_out_states(self, hidden: Tensor, layers: DecoderLayers) -> None:
        """Give everyone the states that he watches.

        Args:
            hidden: The last layer's output.
            layers: Whose norm makes `LAST_HIDDEN` of it.
        """
        if not self._watched:
            return

        def states(names: frozenset[str], rows: slice) -> dict[str, Tensor]:
            found = {name: self._states[name][rows] for name in names - {LAST_HIDDEN}}
            return found | ({LAST_HIDDEN: layers.norm(hidden[rows])} if LAST_HIDDEN in names else {})

        if self._decoding is not None:
            self._decoding.states = states(self._decoding.watch, slice(self.num_decoding))
        for i, chunk in enumerate(self.chunks):
            if chunk.watch:
                first, count = self.place(i)
                rows = slice(first, first + count)
                chunk.left = torch.arange(count) if self._left is None else self._left[rows]
                chunk.states = states(chunk.watch, rows)

    def place(self, chunk: int) -> tuple[int, int]:
        """First row and number of rows of a chunk."""
        return self.num_decoding + sum(self.counts[:chunk]), self.counts[chunk]

    def with_logits(self, hidden: Tensor) -> Tensor:
        """The rows whose logits are wanted."""
        wanted = [np.arange(self.num_decoding)]
        for i, chunk in enumerate(self.chunks):
            first, count = self.place(i)
            wanted.append(np.arange(first + count - min(chunk.num_logits, count), first + count))
        indices = np.concatenate(wanted)
        return hidden if len(indices) == hidden.shape[0] else hidden[torch.from_numpy(indices).to(hidden.device)]


class PrefillView:
    """What a reducer sees of one prompt at the input of a layer.

    Attributes:
        layer: The layer about to run, of `num_layers`.
        hidden: (n, D), the prompt's rows that are left.
        visual: (V,) int64, which of these rows are visual.
        origins: (V,) int64, which of the prompt's visual rows these are, counted over all its items.
        items: (V,) int64, which item each of them belongs to.
        item_sizes: Per item, visual rows that entered the decoder.
        protected: (V,) bool, those that an earlier stage of the reducer wants kept.
    """

    def __init__(
        self, owner: ModelRunner, chunk: Chunk, layer: int, hidden: Tensor, before: Tensor, rotary: Rotary
    ) -> None:
        assert chunk.drops is not None
        self.layer, self.hidden, self.num_layers = layer, hidden, owner._layers.num_layers
        drops = chunk.drops
        self.visual, self.origins = drops.visual, drops.origins
        self.items, self.protected = drops.items[drops.origins], drops.protected[drops.origins]
        self.item_sizes: tuple[int, ...] = tuple(torch.bincount(drops.items).tolist())
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
        query = self._owner._layers.queries(index, source[rows], (cos[rows], sin[rows]))
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
        places = torch.from_numpy(cache.slot_mapping(layer, self._slot)).to(source.device)
        earlier = cache.keys.flatten(0, 1)[places] if held else source.new_empty(0, *cache.keys.shape[2:])
        if layer < self.layer:
            return earlier
        return torch.cat([earlier, self._owner._layers.keys(layer, source, self._rotary)])


def layers_of(reducer: InPrefill, num_layers: int) -> tuple[int, ...]:
    """At the input of which layers a reducer wants to be asked.

    Raises:
        ReducerFault: It failed, or named what is no layer.
    """
    name = type(reducer).__name__
    with plugin_errors(name, "when asked for its layers"):
        layers = tuple(reducer.layers(num_layers))
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise ReducerFault(name, f"has to name layers by whole numbers, not {layers!r}")
    return layers


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
        with plugin_errors(name, f"at layer {layer}"):
            keep = reducer.in_prefill(layer, view)
            _check_keep(keep, drops.visual.shape[0], name)
    except MmError as error:
        chunk.error = error
        return everything
    stays = torch.ones(view.num_rows, dtype=torch.bool, device=view.hidden.device)
    stays[drops.visual] = False
    stays[drops.visual[keep]] = True
    rows = everything[stays]
    place = torch.cumsum(stays, 0) - 1
    drops.visual, drops.origins = place[drops.visual[keep]], drops.origins[keep]
    drops.left[layer] = drops.visual, drops.origins
    return rows


def _check_keep(keep: Tensor, num_visual: int, name: str) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.int64 or keep.dim() != 1:
        raise ReducerFault(name, "has to return an int64 vector of kept visual rows")
    if keep.shape[0] == 0:
        raise ReducerFault(name, f"kept none of {num_visual} tokens; at least one has to stay")
    inside = bool((keep[0] >= 0) & (keep[-1] < num_visual))
    if not inside or not bool((keep[1:] > keep[:-1]).all()):
        raise ReducerFault(name, f"kept rows are not strictly ascending within 0..{num_visual - 1}")


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
