"""Reducers inside the decoder: which visual tokens leave between two layers during prefill.

At the input of a layer a reducer sees the hidden states of one prompt and names the visual tokens that stay, in this
layer and in all layers above it. Text tokens always stay.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.data.arrays import ints
from mm.data.media import Kind
from mm.data.tokens import Encoded
from mm.engine.kv_cache.blocks import KVCache
from mm.errors import MmError, ReducerFault
from mm.models.attention import Rotary
from mm.models.layers import DecoderLayers
from mm.plugins.calls import PluginCalls
from mm.plugins.reducer import InPrefill
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors


@dataclass(kw_only=True)
class PruneState:
    """Which visual tokens of a prompt are left while its layers run.

    Attributes:
        reducers: Layer index to the reducer that is asked at the input of that layer.
        visual: (V,) int64, indices of the visual tokens that are left, counted in what is left of the chunk.
        origins: (V,) int64, which of the prompt's visual tokens these are.
        items: (all visual tokens of the prompt,) int64, which media item each belongs to.
        kinds: Per media item, what it is.
        protected: (all visual tokens of the prompt,) bool, tokens that an earlier stage wants kept.
        kept: Layer index to what `visual` and `origins` became there, for layers that dropped tokens.
    """

    reducers: Mapping[int, InPrefill]
    visual: Tensor
    origins: Tensor
    items: Tensor
    kinds: tuple[Kind, ...]
    protected: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])
    error: MmError | None = None


class PrefillView:
    """What a reducer sees of one prompt at the input of a layer.

    Args:
        model: The language model.
        cache: Where keys of earlier layers and of a cached prefix are.
        seq_index: The sequence's entry in the cache.
        state: What is left of the prompt's visual tokens.
        layer: The layer about to run.
        hidden: (n, D), its input: the prompt's tokens that are left.
        previous: (n, D), the input of the layer before it, for the same tokens.
        rotary: cos and sin of these tokens.

    Attributes:
        visual: (V,) int64, which of the n tokens are visual.
        origins: (V,) int64, which of the prompt's visual tokens these are, counted over all its items.
        items: (V,) int64, which item each of them belongs to.
        item_sizes: Per item, the visual tokens that entered the decoder.
        item_kinds: Per item, what it is.
        protected: (V,) bool, tokens that an earlier stage of the reducer wants kept.
    """

    def __init__(
        self,
        model: DecoderLayers,
        cache: KVCache,
        seq_index: int,
        state: PruneState,
        *,
        layer: int,
        hidden: Tensor,
        previous: Tensor,
        rotary: Rotary,
    ) -> None:
        self.layer, self.hidden, self.num_layers = layer, hidden, model.num_layers
        self.visual, self.origins = state.visual, state.origins
        self.items, self.protected = state.items[state.origins], state.protected[state.origins]
        self.item_sizes: tuple[int, ...] = tuple(ints(torch.bincount(state.items, minlength=len(state.kinds))))
        self.item_kinds = state.kinds
        self._model, self._cache, self._seq_index = model, cache, seq_index
        self._previous, self._rotary = previous, rotary

    @property
    def num_rows(self) -> int:
        """Tokens of the prompt that are left, text included."""
        return self.hidden.shape[0]

    def attention_rows(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """Attention of a few tokens to the visual ones, without a full attention map.

        The softmax is over everything that a token sees, in float32. Then the visual columns are selected.

        Args:
            rows: (r,) int64 indices of prompt tokens.
            layer: This layer (the default), which is about to run, or the layer before it.

        Returns:
            (H, r, V) float32.
        """
        layer = self.layer if layer is None else layer
        if layer not in (self.layer, self.layer - 1) or layer < 0:
            raise ReducerFault("attention_rows", f"asks for layer {layer} at the input of layer {self.layer}")
        source = self.hidden if layer == self.layer else self._previous
        cos, sin = self._rotary
        query = self._model.queries(layer, source[rows], (cos[rows], sin[rows]))
        keys = self._keys(layer, source)
        num_cached = keys.shape[0] - self.num_rows
        heads, width = query.shape[1], query.shape[2]
        grouped = query.float().view(rows.shape[0], keys.shape[1], heads // keys.shape[1], width)
        scores = torch.einsum("rkgd,skd->kgrs", grouped, keys.float()).flatten(0, 1) * width**-0.5
        is_seen = torch.arange(keys.shape[0], device=rows.device) <= rows[:, None] + num_cached
        return scores.masked_fill(~is_seen, -torch.inf).softmax(-1)[..., self.visual + num_cached]

    def keys(self) -> Tensor:
        """(n, H_kv, d): this layer's rotated keys of the prompt's tokens."""
        return self._keys(self.layer, self.hidden)[-self.num_rows :]

    def _keys(self, layer: int, source: Tensor) -> Tensor:
        """All keys that the prompt's tokens see. Those of a cached prefix come first."""
        cache = self._cache
        if layer < self.layer:
            return cache.read(layer, self._seq_index)[0]
        keys = self._model.keys(layer, source, self._rotary)
        if not cache.lengths[layer, self._seq_index]:
            return keys
        return torch.cat([cache.read(layer, self._seq_index)[0], keys])


def layers_of(reducer: InPrefill, num_layers: int, calls: PluginCalls) -> tuple[int, ...]:
    """The layers at whose input a reducer asks to be called.

    Raises:
        ReducerFault: It failed, or it named something that is no layer.
    """
    name, when = name_of(reducer), "when asked for its layers"

    def ask() -> tuple[int, ...]:
        with plugin_errors(name, when):
            return tuple(reducer.layers(num_layers))

    layers = calls.call("reducer", (name,), when, ask, timeout_s=calls.limits.step_timeout_s)
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ReducerFault(name, f"has to name layers by whole numbers, not {layers!r}")
    return layers


def select_kept(state: PruneState, view: PrefillView, calls: PluginCalls) -> Tensor:
    """Ask the reducer of a layer, and update the state.

    A reducer that fails affects only its own prompt: the error is noted in `state.error`, and all tokens stay.

    Returns:
        (n',) int64 ascending: the tokens of the chunk that stay.
    """
    everything = torch.arange(view.num_rows, device=view.hidden.device)
    if not state.visual.shape[0] or state.error is not None:
        return everything
    reducer = state.reducers[view.layer]
    name = name_of(reducer)

    def ask() -> Tensor:
        with plugin_errors(name, f"at layer {view.layer}"):
            keep = reducer.in_prefill(view.layer, view)
            _check_keep(keep, state.visual.shape[0], name)
        return keep

    try:
        keep = calls.call(
            "reducer",
            (name,),
            f"at layer {view.layer}",
            ask,
            timeout_s=calls.limits.step_timeout_s,
            holds_all=True,
        )
    except MmError as error:
        state.error = error
        return everything
    stays = torch.ones(view.num_rows, dtype=torch.bool, device=view.hidden.device)
    stays[state.visual] = False
    stays[state.visual[keep]] = True
    new_index = torch.cumsum(stays, 0) - 1
    state.visual, state.origins = new_index[state.visual[keep]], state.origins[keep]
    state.kept[view.layer] = state.visual, state.origins
    return everything[stays]


def _check_keep(keep: object, num_visual: int, name: str) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.int64 or keep.dim() != 1:
        raise ReducerFault(name, "has to return an int64 vector of kept visual rows")
    if keep.shape[0] == 0:
        raise ReducerFault(name, f"kept none of {num_visual} tokens; at least one has to stay")
    is_inside = bool((keep[0] >= 0) & (keep[-1] < num_visual))
    if not is_inside or not bool((keep[1:] > keep[:-1]).all()):
        raise ReducerFault(name, f"kept rows are not strictly ascending within 0..{num_visual - 1}")


def visual_planes(media: abc.Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of all visual tokens of a prompt: the media item of each (int64), and whether it is protected (bool)."""
    sizes = torch.tensor([item.tokens.num_tokens for item in media])
    protected = [item.tokens.protected for item in media]
    flags = [
        torch.zeros(int(size), dtype=torch.bool) if plane is None else plane.cpu()
        for size, plane in zip(sizes, protected, strict=True)
    ]
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(device), torch.cat(flags).to(device)
