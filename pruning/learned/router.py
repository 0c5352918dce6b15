"""Router: a small head decides which groups of neighbouring tokens go on whole, and which as their mean.

Idea      ViR in InternVL3.5-Flash, arXiv:2508.18265. Trained by demos/train/train_router.py.
Stage     pre_llm, after the projector.             Needs  weights for the model.
Equation  s_g = head(mean of group g, mean distance from it); the groups with the largest s_g go on whole, of the others
          the mean, at the place of the first token. Groups are blocks of 2x2 cells, smaller at an odd border.
Cost      One small MLP per group; no second forward.
Differs   InternVL decides per tile of 256 tokens between two projectors. Here every group decides, and the projector is
          the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.reducer import Count, ReduceContext, Reduction, Stage
from mm.plugins.weights import ReducerWeights
from pruning.base import keep_all, merge_means, number_option, ratio_option
from pruning.learned.base import LearnedReducer, started
from pruning.learned.routing import RouterNetwork

GROUP = 2
"""Cells along one side of a group."""


@dataclass(frozen=True, kw_only=True)
class Router(LearnedReducer):
    """Pool the groups of 2x2 tokens that a trained head finds dispensable.

    Attributes:
        keep_ratio: Tokens kept / tokens in, pooled ones included; at least .25, where every group is pooled. What the
            weights were trained for where neither this nor `threshold` is given.
        threshold: Groups with a larger score go on whole, however many they are. In place of `keep_ratio`.
    """

    name: ClassVar[str] = "router"
    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image"})
    count: ClassVar[Count] = "bounded"
    needs_grid: ClassVar[bool] = True
    weights: str = "router"
    keep_ratio: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            number = number_option(self.name, "threshold", self.threshold, -1e9, 1e9)
            object.__setattr__(self, "threshold", number)
            if self.keep_ratio is not None:
                raise InvalidOption(self.name, "threshold", "takes the place of keep_ratio; give one of them")
        if self.keep_ratio is not None:
            ratio = ratio_option(self.name, "keep_ratio", self.keep_ratio)
            if ratio < 1 / GROUP**2:
                message = f"was {ratio:g}; one token per group of {GROUP}x{GROUP} stays, so it has to be .25 or more"
                raise InvalidOption(self.name, "keep_ratio", message)
            object.__setattr__(self, "keep_ratio", ratio)

    @classmethod
    def untrained(cls, width: int) -> ReducerWeights:
        card = {"reducer": cls.name, "width": width, "group": GROUP, "hidden": 64, "default_keep_ratio": 0.4}
        return started(card, cls.build)

    @staticmethod
    def build(weights: ReducerWeights) -> RouterNetwork:
        if weights.count("group") != GROUP:
            raise weights.bad(f"were trained for groups other than {GROUP}x{GROUP}")
        return RouterNetwork(weights.count("width"), weights.count("hidden"))

    def resolve(self, weights: ReducerWeights) -> Mapping[str, Any]:
        is_open = self.keep_ratio is None and self.threshold is None
        return {"keep_ratio": weights.number("default_keep_ratio")} if is_open else {}

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        if kind not in self.kinds or self.keep_ratio is None:
            return num_tokens
        sizes = group_sizes(grid or (1, 1, num_tokens))
        return min(num_tokens, kept_with(num_opened(sizes, self.keep_ratio), sizes))

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        if tokens.kind not in self.kinds or tokens.num_tokens == 0 or self.keep_ratio == 1:
            return keep_all(tokens)
        group = group_of_cell(tokens.grid).to(tokens.embeddings.device)
        scores = self.scores(tokens.embeddings, group)
        is_whole = scores > self.threshold if self.threshold is not None else self._largest(scores, tokens.grid)
        return pool_groups(tokens, group, is_whole)

    def _largest(self, scores: Tensor, grid: Grid) -> Tensor:
        assert self.keep_ratio is not None
        sizes = group_sizes(grid).to(scores.device)
        order = torch.sort(torch.nan_to_num(scores, nan=-torch.inf), descending=True, stable=True).indices
        is_whole = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        return is_whole.index_fill(0, order[: num_opened(sizes, self.keep_ratio)], True)

    @torch.no_grad()
    def scores(self, embeddings: Tensor, group: Tensor) -> Tensor:
        """(G,) of tokens (N, D) in the groups (N,)."""
        x, num_groups = embeddings.float(), int(group.max()) + 1
        counts = torch.bincount(group, minlength=num_groups).unsqueeze(1)
        mean = x.new_zeros(num_groups, x.shape[1]).index_add(0, group, x) / counts
        spread = torch.zeros_like(mean).index_add(0, group, (x - mean[group]).abs()) / counts
        return cast(RouterNetwork, self.network).score(mean, spread)


def group_of_cell(grid: Grid) -> Tensor:
    """(N,) int64: the group of each cell, numbered in reading order."""
    _, h, w = grid
    across, down = -(-w // GROUP), -(-h // GROUP)
    steps, rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return ((steps * down + rows // GROUP) * across + columns // GROUP).flatten()


def group_sizes(grid: Grid) -> Tensor:
    """(G,) cells of each group."""
    return torch.bincount(group_of_cell(grid))


def num_opened(sizes: Tensor, keep_ratio: float) -> int:
    """Groups that go on whole so that at most `keep_ratio` of all tokens are kept, pooled ones included.

    Where all groups are full it is the largest such number. Groups at an odd border are counted as full ones.
    """
    total, largest = int(sizes.sum()), int(sizes.max()) if len(sizes) else 1
    if keep_ratio >= 1 or largest == 1:
        return len(sizes)
    return max(0, min(len(sizes), int((keep_ratio * total - len(sizes)) / (largest - 1) + 1e-9)))


def kept_with(opened: int, sizes: Tensor) -> int:
    """The most tokens that are kept where so many groups go on whole."""
    return int(torch.sort(sizes, descending=True).values[:opened].sum()) + len(sizes) - opened


def pool_groups(tokens: VisualTokens, group: Tensor, is_whole: Tensor) -> Reduction:
    """The tokens of groups (N,) that go on whole (G,), and of each other group the mean, at its first token."""
    first = torch.full_like(is_whole, tokens.num_tokens, dtype=torch.int64)
    everything = torch.arange(tokens.num_tokens, device=group.device)
    first = first.scatter_reduce(0, group, everything, "amin")
    anchors = torch.where(is_whole[group], everything, first[group])
    keep, rows = torch.unique(anchors, return_inverse=True)
    if len(keep) == tokens.num_tokens:
        return keep_all(tokens)
    return merge_means(keep, rows, everything, tokens.sizes)
