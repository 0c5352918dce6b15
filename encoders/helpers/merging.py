"""Towers whose blocks let a reducer merge tokens between attention and MLP.

The towers of libraries cannot host a reducer between attention and MLP, so the loop over the blocks is written here.
Each block still computes with its own modules. Attention is the fused one, with the logarithm of each token's size
added to its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.errors import ReducerFault
from mm.plugins.features import TOWER_FEATURES
from mm.plugins.reducer import InTower, Matched
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors

Attend = Callable[[nn.Module, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A block, hidden states (B, n, D) and a bias (B, 1, 1, n) on each key's scores, to the hidden states (B, n, D) after
the attention and the keys (B, H, n, dh)."""

FeedForward = Callable[[nn.Module, Tensor], Tensor]
"""A block and the hidden states after its attention, to the hidden states after the block."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The tokens that are left of a batch of pictures, in raster order of their anchors.

    Attributes:
        hidden: (B, m, D). Prefix tokens such as [CLS] are left out.
        anchors: (B, m) int64, the patch whose position each token has.
        sizes: (B, m) float32, the number of patches that each token stands for.
    """

    hidden: Tensor
    anchors: Tensor
    sizes: Tensor


def run_blocks(
    blocks: Sequence[nn.Module],
    hidden: Tensor,
    num_prefix: int,
    merging: InTower,
    attend: Attend,
    feed_forward: FeedForward,
) -> Merged:
    """Run all `blocks` on hidden states (B, num_prefix + patches, D), and merge in each block what `merging` matches.

    Args:
        num_prefix: Tokens before the patches, such as [CLS]. They are never merged.

    Raises:
        ReducerFault: `merging` failed, or matched what cannot be merged.
    """
    num_tokens, name = hidden.shape[1], name_of(merging)
    with plugin_errors(name, "in the tower"):
        counts = merging.merges(num_tokens - num_prefix, len(blocks))
    sizes = torch.ones(hidden.shape[:2], device=hidden.device)
    anchors = torch.arange(num_tokens, device=hidden.device).expand(len(hidden), -1)
    for block, count in zip(blocks, counts, strict=True):
        bias = sizes.log().to(hidden.dtype)[:, None, None] if hidden.shape[1] < num_tokens else None
        hidden, keys = attend(block, hidden, bias)
        if count:
            with plugin_errors(name, "in the tower"):
                matched = merging.match(keys.float().mean(dim=1), count, num_prefix)
                _check(matched, hidden.shape[1], count, name)
            hidden, sizes = _merge(matched.slots, hidden, sizes, matched.anchors.shape[1])
            anchors = anchors.gather(1, matched.anchors)
        hidden = feed_forward(block, hidden)
    return _in_order(hidden, anchors, sizes, num_prefix)


def _merge(slots: Tensor, hidden: Tensor, sizes: Tensor, num_left: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens of each slot, weighted by size and computed in float32, and the new sizes."""
    totals = sizes.new_zeros(len(sizes), num_left).scatter_add_(1, slots, sizes)
    targets = slots.unsqueeze(-1).expand_as(hidden)
    sums = sizes.new_zeros(len(sizes), num_left, hidden.shape[2])
    sums.scatter_add_(1, targets, hidden.float() * sizes.unsqueeze(-1))
    return (sums / totals.unsqueeze(-1)).to(hidden.dtype), totals


def _in_order(hidden: Tensor, anchors: Tensor, sizes: Tensor, num_prefix: int) -> Merged:
    anchors, order = anchors.sort(dim=1)
    order, anchors = order[:, num_prefix:], anchors[:, num_prefix:] - num_prefix
    hidden = hidden.gather(1, order.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))
    return Merged(hidden=hidden, anchors=anchors, sizes=sizes.gather(1, order))


def _check(matched: Matched, num_tokens: int, count: int, owner: str) -> None:
    """Refuse wrong shapes and slots without their anchor. The device is waited for once or twice, not per value."""
    num_left = num_tokens - count
    if matched.slots.shape[1] != num_tokens or matched.anchors.shape[1] != num_left:
        raise ReducerFault(owner, f"left {matched.anchors.shape[1]} of {num_tokens} tokens, but had to merge {count}")
    slots, anchors = matched.slots, matched.anchors
    fits = (slots >= 0).all() & (slots < num_left).all() & (anchors >= 0).all() & (anchors < num_tokens).all()
    if not fits or not (slots.gather(1, anchors) == torch.arange(num_left, device=slots.device)).all():
        raise ReducerFault(owner, "matched tokens with a slot that does not exist, or whose anchor is in another slot")


def merged_tokens(
    embeddings: Sequence[Tensor],
    merged: Sequence[tuple[Tensor, Tensor]],
    grid: Grid,
    kind: Kind,
    features: Tensor,
    needs: frozenset[str],
) -> VisualTokens:
    """The visual tokens of one item of T pictures after merging.

    Args:
        embeddings: (m, D) of each picture.
        merged: Anchors and sizes, (m,) each, of each picture.
        grid: (T, h, w), cells before merging.
        features: (T m, d), the tokens before the projector: auxiliary features where `needs` names them.
    """
    _, _, width = grid
    positions = [
        torch.stack([torch.full_like(anchors, step), anchors // width, anchors % width], dim=1)
        for step, (anchors, _) in enumerate(merged)
    ]
    return VisualTokens(
        embeddings=torch.cat(list(embeddings)),
        positions=torch.cat(positions),
        sizes=torch.cat([sizes for _, sizes in merged]),
        grid=grid,
        kind=kind,
        aux_features={TOWER_FEATURES: features.float().mT} if TOWER_FEATURES in needs else {},
    )
