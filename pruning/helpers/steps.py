"""Reducers that look at one crop or one frame at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.quota import quota
from mm.data.tokens import VisualTokens
from mm.plugins.reducer import ReduceContext, Reduction
from mm.plugins.registry import name_of
from pruning.base import BudgetReducer, bool_option, keep_all


def runs(tokens: VisualTokens) -> list[slice]:
    """Where the tokens of each step along t lie, without empty steps. Waits for a GPU only after another reduction."""
    t, h, w = tokens.grid
    if tokens.num_tokens == tokens.num_tokens_in:
        return [slice(i * h * w, (i + 1) * h * w) for i in range(t) if h * w]
    counts = torch.bincount(tokens.positions[:, 0], minlength=t).tolist()
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True) if count]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The n tokens of one crop or frame.

    Attributes:
        embeddings: (n, D).
        sizes: (n,).
        aux_features: As of the item, last axis n.
    """

    embeddings: Tensor
    sizes: Tensor
    aux_features: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepReducer(BudgetReducer):
    """A reducer that decides within each crop of an image and each frame of a clip. Subclasses write `pick`.

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        joint: Decide over all crops or frames of an item at once, instead of giving each its share.
    """

    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        bool_option(name_of(self), "joint", self.joint)

    @torch.no_grad()
    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        k = self.plan(tokens.num_tokens, tokens.grid, tokens.kind)
        if k >= tokens.num_tokens:
            return keep_all(tokens)
        aux_features = self.prepare(tokens, context)
        places = [slice(0, tokens.num_tokens)] if self.joint else runs(tokens)
        shares = quota(k, [place.stop - place.start for place in places])
        parts = [
            (place.start, self._decide(_step(tokens, aux_features, place), share))
            for place, share in zip(places, shares, strict=True)
            if share
        ]
        return _joined(parts, tokens)

    def _decide(self, step: Step, k: int) -> Reduction:
        num_tokens = step.embeddings.shape[0]
        if k >= num_tokens:
            return Reduction(keep=torch.arange(num_tokens, device=step.embeddings.device))
        return self.decide(step, k)

    def prepare(self, tokens: VisualTokens, context: ReduceContext) -> Mapping[str, Tensor]:
        """The auxiliary features of the steps: those of `needs`, or what is computed from the item as a whole."""
        return {name: context.aux_features[name] for name in self.needs}

    def decide(self, step: Step, k: int) -> Reduction:
        """What becomes of one step's tokens, of which `k` stay, with 0 < k < n."""
        return Reduction(keep=self.pick(step, k).sort().values)

    def pick(self, step: Step, k: int) -> Tensor:
        """(k,) int64: the kept indices in any order, with 0 < k < n."""
        raise NotImplementedError


def _step(tokens: VisualTokens, aux_features: Mapping[str, Tensor], place: slice) -> Step:
    return Step(
        embeddings=tokens.embeddings[place],
        sizes=tokens.sizes[place],
        aux_features={name: plane[..., place] for name, plane in aux_features.items()},
    )


def _joined(parts: Sequence[tuple[int, Reduction]], tokens: VisualTokens) -> Reduction:
    """The decisions about several steps as one about the item; each comes with its step's first token."""
    keep = torch.cat([reduction.keep + start for start, reduction in parts])
    if all(reduction.merge is None for _, reduction in parts):
        return Reduction(keep=keep)
    entries, first_row = [], 0
    for start, reduction in parts:
        entries.append(_entries(reduction, first_row, start))
        first_row += reduction.keep.shape[0]
    places, weights = (torch.cat(planes, dim=-1) for planes in zip(*entries, strict=True))
    shape = (keep.shape[0], tokens.num_tokens)
    merge = torch.sparse_coo_tensor(places, weights, shape, check_invariants=False)
    sizes = [
        tokens.sizes.index_select(0, reduction.keep + start) if reduction.sizes is None else reduction.sizes
        for start, reduction in parts
    ]
    return Reduction(keep=keep, merge=merge, sizes=torch.cat(sizes))


def _entries(reduction: Reduction, first_row: int, first_column: int) -> tuple[Tensor, Tensor]:
    """Places (2, m) and weights (m,) of a step's decision within the item's merge matrix."""
    keep = reduction.keep
    if reduction.merge is None:
        places, weights = (
            torch.stack([torch.arange(len(keep), device=keep.device), keep]),
            torch.ones_like(keep).float(),
        )
    else:
        merge = reduction.merge.coalesce()
        places, weights = merge.indices(), merge.values()
    shift = torch.tensor([[first_row], [first_column]], device=keep.device)
    return places + shift, weights
