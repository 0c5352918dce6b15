"""Reducers after prefill: which tokens leave the KV cache once a prompt has been computed.

These reducers see how many tokens each layer holds and which of them are visual, and return the tokens that stay. When
a reducer returns something that cannot be applied, nothing is removed and the error names the reducer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Encoded, Prompt
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.prefill_pruning import PruneState
from mm.errors import MmError, ReducerFault
from mm.plugins.cache_view import CacheView
from mm.plugins.calls import PluginCalls
from mm.plugins.reducer import InDecode
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors


def prune_cache(
    cache: KVCache,
    seq_index: int,
    prompt: Prompt,
    num_cached_tokens: int,
    state: PruneState | None,
    reducers: Sequence[InDecode],
    calls: PluginCalls | None = None,
    media: Sequence[Encoded] = (),
) -> tuple[int, MmError | None]:
    """Apply what the reducers decide, one after the other: each sees what the one before it left.

    Args:
        num_cached_tokens: Tokens of the prompt that came from the prefix cache.
        state: What reducers between layers left of the prompt; None where there are none.
        calls: Calls the reducers.
        media: The prompt's items.

    Returns:
        How many of the prompt's first tokens are where they were in every layer, and the error of a reducer that
        failed. A reducer that fails removes nothing, and those after it are not asked.
    """
    planes = _visual_of_layers(cache.shape.num_layers, prompt, num_cached_tokens, state)
    items = _Items.of(media, prompt.is_visual.device)
    num_unchanged = prompt.length
    for reducer in reducers:
        try:
            view = _view(cache, seq_index, planes, items)
            kept = _ask(reducer, view, calls or PluginCalls())
        except MmError as error:
            return num_unchanged, error
        for layer, tokens in kept.items():
            num_unchanged = min(num_unchanged, _num_unmoved(tokens))
            cache.keep_tokens(seq_index, layer, tokens)
            visual, origins = planes[layer]
            stays = torch.isin(visual, tokens)
            planes[layer] = torch.searchsorted(tokens, visual[stays]), origins[stays]
    return num_unchanged, None


@dataclass(frozen=True, kw_only=True)
class _Items:
    """What the items of a prompt are, token by token; see `CacheView`."""

    items: Tensor
    cells: Tensor
    kinds: tuple[Kind, ...]

    @classmethod
    def of(cls, media: Sequence[Encoded], device: torch.device) -> _Items:
        sizes = torch.tensor([item.tokens.num_tokens for item in media], dtype=torch.int64)
        cells = [item.tokens.positions.to(device) for item in media]
        return cls(
            items=torch.repeat_interleave(torch.arange(len(media)), sizes).to(device),
            cells=torch.cat(cells) if cells else torch.zeros(0, 3, dtype=torch.int64, device=device),
            kinds=tuple(item.tokens.kind for item in media),
        )


def _view(cache: KVCache, seq_index: int, planes: Sequence[tuple[Tensor, Tensor]], items: _Items) -> CacheView:
    def read(layer: int) -> tuple[Tensor, Tensor]:
        return cache.read(layer, seq_index)

    return CacheView(
        lengths=tuple(cache.lengths[:, seq_index].tolist()),
        visual=tuple(visual for visual, _ in planes),
        origins=tuple(origins for _, origins in planes),
        items=items.items,
        cells=items.cells,
        item_kinds=items.kinds,
        read=read,
    )


def _ask(reducer: InDecode, view: CacheView, calls: PluginCalls) -> dict[int, Tensor]:
    name, when = name_of(reducer), "when the prompt was in"

    def ask() -> dict[int, Tensor]:
        with plugin_errors(name, when):
            kept = reducer.prefill_done(view)
            _check(kept, view.lengths, name)
            return dict(kept)

    return calls.call("reducer", (name,), when, ask, timeout_s=calls.limits.step_timeout_s, holds_all=True)


def _visual_of_layers(
    num_layers: int, prompt: Prompt, num_cached_tokens: int, state: PruneState | None
) -> list[tuple[Tensor, Tensor]]:
    """Per layer: which tokens of the cache are visual, and which of the prompt's visual tokens these are."""
    visual = prompt.is_visual.nonzero().squeeze(1)
    found, plane = list[tuple[Tensor, Tensor]](), (visual, torch.arange(visual.shape[0], device=visual.device))
    for layer in range(num_layers):
        if state is not None and layer in state.kept:
            kept, origins = state.kept[layer]
            plane = kept + num_cached_tokens, origins
        found.append(plane)
    return found


def _check(kept: object, lengths: Sequence[int], name: str) -> None:
    if not isinstance(kept, Mapping):
        raise ReducerFault(name, "has to return a mapping of layers to the rows that stay")
    given: Mapping[object, object] = kept  # pyright: ignore[reportUnknownVariableType]
    for layer, tokens in given.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(lengths):
            raise ReducerFault(name, f"names layer {layer!r}; there are 0..{len(lengths) - 1}")
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise ReducerFault(name, f"has to return an int64 vector of the rows that stay in layer {layer}")
        if tokens.shape[0] == 0:
            raise ReducerFault(name, f"kept none of {lengths[layer]} rows in layer {layer}; at least one has to stay")
        is_inside = bool((tokens[0] >= 0) & (tokens[-1] < lengths[layer]))
        if not is_inside or not bool((tokens[1:] > tokens[:-1]).all()):
            raise ReducerFault(name, f"rows of layer {layer} are not strictly ascending within 0..{lengths[layer] - 1}")


def _num_unmoved(tokens: Tensor) -> int:
    """How many of the first tokens stay where they are."""
    moved = (tokens != torch.arange(tokens.shape[0], device=tokens.device)).nonzero()
    return int(moved[0]) if len(moved) else tokens.shape[0]
