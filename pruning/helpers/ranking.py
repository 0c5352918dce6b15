"""What methods inside the decoder share: options that name layers, and the score of the prompt's last row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.errors import InvalidOption
from mm.plugins.reducer import PrefillView
from pruning.base import Rounding, budget, top_k_ascending

PROTECTED = 2.0
"""Score of a protected token: above every attention weight."""


def last_row_scores(view: PrefillView, layer: int) -> Tensor:
    """(V,) float32: how much the prompt's last row attends to each visual row in `layer`, averaged over heads.

    Tokens that an earlier stage protects come first.
    """
    last = torch.tensor([view.num_rows - 1], device=view.visual.device)
    return view.attention_rows(last, layer).mean(dim=0)[0].masked_fill(view.protected, PROTECTED)


def keep_best(scores: Tensor, k: int) -> Tensor:
    """(k,) int64, ascending: the `k` best of `scores` (V,), all of them when there are no more."""
    if k >= scores.shape[0]:
        return torch.arange(scores.shape[0], device=scores.device)
    return top_k_ascending(scores, k)


def keep_best_of_items(scores: Tensor, view: PrefillView, keep_ratio: float, rounding: Rounding) -> Tensor:
    """(k,) int64, ascending: of each item its best by `scores` (V,), `keep_ratio` of what entered the decoder."""
    kept = list[Tensor]()
    for item, size in enumerate(view.item_sizes):
        columns = (view.items == item).nonzero().squeeze(1)
        kept.append(columns[keep_best(scores[columns], budget(size, keep_ratio, rounding))])
    return torch.cat(kept)


def layers_option(owner: str, option: str, value: object) -> tuple[int, ...]:
    """`value` as strictly ascending layers of at least 1; empty stands for the method's own places.

    Raises:
        InvalidOption: It is something else.
    """
    layers = tuple(value) if isinstance(value, list | tuple) else None
    if layers is None or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise InvalidOption(owner, option, f"has to be a list of whole numbers such as [2,8], got {value!r}")
    if any(layer < 1 for layer in layers) or list(layers) != sorted(set(layers)):
        raise InvalidOption(owner, option, f"has to name layers from 1 on, each once and ascending, got {value!r}")
    return layers


def spread(owner: str, option: str, num_stages: int, num_layers: int) -> tuple[int, ...]:
    """Layers that cut a decoder into `num_stages` + 1 parts of about equal depth: 8, 16, 24 of 32 for three.

    Args:
        owner, option: What the user set `num_stages` by.

    Raises:
        InvalidOption: There are too few layers.
    """
    layers = tuple(stage * num_layers // (num_stages + 1) for stage in range(1, num_stages + 1))
    if layers and (layers[0] < 1 or len(set(layers)) < num_stages):
        most = max(num_layers - 1, 0)
        what = f"is {num_stages}, but this model's decoder has {num_layers} layers; give {option}={most} or fewer"
        raise InvalidOption(owner, option, what if most else f"{what}: it cannot drop tokens between layers")
    return layers


def scaled(layers: Sequence[int], num_layers: int, of: int) -> tuple[int, ...]:
    """`layers` of a decoder with `of` layers, at the same depth of one with `num_layers`; those that meet are one."""
    places = {min(max(1, round(layer * num_layers / of)), num_layers - 1) for layer in layers}
    return tuple(sorted(place for place in places if place > 0))
