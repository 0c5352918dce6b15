"""FlashVID: in each frame keep what is looked at and differs, merge the rest along trees through time.

Paper     "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
          ICLR 2026, arXiv:2602.08024 (training-free). Its part outside the decoder; `flashvid + fastv` adds a part
          inside, and the authors' r with an expansion of 1.25 is a `keep_ratio` of 1.25 r here.
Stage     temporal, after the projector; clips only.
Needs     attention_received, of the block that the features come from.
Cost      O(F n^2 D) for the similarities, O(F n) per token chosen in every frame, O(n^2 D) per frame for the clusters.
Equation  a new segment of time begins where frame means have a cosine below `segment_threshold`, and at the least alike
          of them until there are `min_segments`. Of a frame's m = ceil(n keep_ratio) tokens, ceil(m diverse_share) are
          chosen greedily: the next is argmax_j a_j e_j min_{c chosen} (1 - cos(x_c, x_j)), the first
          argmax_j a_j e_j min_{i != j} (1 - cos(x_i, x_j)), with a_j = sum_h A[h, j] and, with `event`, e_j the product
          of x_j with the mean of its segment. Within a segment each token not chosen hangs on the most similar such
          token of the frame before, if their cosine is above `tree_threshold`; a tree becomes the mean of its tokens,
          in the place of its root. Where that would leave fewer than m tokens per frame of a segment, the threshold
          rises there to the cosine at which m are left. DPC-kNN makes clusters of each frame's roots, each the mean of
          its members at its centre, so many that the segment has m tokens per frame.
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code, whose tree mean divides by the number of direct children, whose single-frame segments
          merge chosen tokens too, and which rounds the clusters of each frame up: shares by largest remainders keep
          exactly the budget. A negative e_j counts as 0, where theirs turns the choice upside down. No random noise
          breaks ties between densities. Theirs has 8 segments at least, for clips of 32 frames and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.quota import quota
from mm.data.tokens import PublishedPositions
from mm.plugins.features import ATTENTION_RECEIVED
from mm.plugins.reducer import ReduceContext, Reduction
from pruning.base import bool_option, budget, int_option, number_option, unit_rows
from pruning.helpers.clips import ClipReducer, beginnings, num_segments, segments
from pruning.helpers.clusters import dpc_knn

NEIGHBOURS = 7


@dataclass(frozen=True, kw_only=True)
class FlashVID(ClipReducer):
    """Keep what is looked at and differs, merge the rest along trees through time (FlashVID).

    Attributes:
        keep_ratio: Most tokens kept / tokens in, in (0, 1]; rounded up in each frame.
        diverse_share: Share of a frame's tokens that are kept as they are, 0 to 1; the others are merged ones.
        tree_threshold: Cosine above which a token joins one of the frame before, -1 to 1.
        segment_threshold: Cosine of frame means below which a segment of time begins, -1 to 1.
        min_segments: A clip has at least so many segments, or as many as frames. 0 is one for each four frames and at
            most 8, which is 8 for the authors' clips. With as many segments as frames nothing merges through time.
        event: Weigh tokens by what they have in common with their segment too, as in the published figures.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED})
    published_positions: ClassVar[PublishedPositions] = "compact"
    diverse_share: float = 0.7
    tree_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 0
    event: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low in (("diverse_share", 0), ("tree_threshold", -1), ("segment_threshold", -1)):
            object.__setattr__(self, option, number_option("flashvid", option, getattr(self, option), low, 1))
        int_option("flashvid", "min_segments", self.min_segments, 0, 1_000_000)
        bool_option("flashvid", "event", self.event)

    def num_kept(self, num_frames: int, num_per_frame: int) -> int:
        return num_frames * budget(num_per_frame, self.keep_ratio, "ceil")

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        weights = context.aux_features[ATTENTION_RECEIVED].float().sum(dim=0).reshape(frames.shape[:2])
        unit, per_frame = unit_rows(frames), k // len(frames)
        begins = beginnings(frames, self.segment_threshold, self.min_segments or num_segments(len(frames)))
        if self.event:
            weights = weights * event_relevance(frames, begins)
        num_chosen = math.ceil(per_frame * self.diverse_share)
        chosen = torch.zeros_like(weights, dtype=torch.bool)
        chosen.scatter_(1, pick_order(unit, _usable(weights, frames), num_chosen), True)
        roots = tree_roots(unit, chosen, begins, self.tree_threshold, per_frame)
        return _merged(frames, chosen, roots, begins, per_frame - num_chosen)


def event_relevance(frames: Tensor, begins: Tensor) -> Tensor:
    """(F, n) float32: the product of each token of `frames` (F, n, D) with its segment's mean, at least 0."""
    segment = begins.long().cumsum(0) - 1
    means = torch.zeros(int(segment[-1]) + 1, frames.shape[2], device=frames.device)
    means.index_add_(0, segment, frames.float().mean(dim=1))
    means /= torch.bincount(segment).unsqueeze(1)
    return torch.bmm(frames.float(), means[segment].unsqueeze(2)).squeeze(2).clamp_min(0)


def _usable(weights: Tensor, frames: Tensor) -> Tensor:
    """(F, n): minus infinity for tokens that are not finite or whose weight is not."""
    usable = torch.isfinite(weights) & torch.isfinite(frames).all(dim=-1)
    return torch.where(usable, weights.clamp_min(0), -math.inf)


def pick_order(unit: Tensor, weights: Tensor, k: int) -> Tensor:
    """(F, k) int64: of each frame, the chosen of the unit rows (F, n, D) in the order they are chosen, 0 <= k <= n.

    The lowest index wins a tie. A token of weight minus infinity is chosen only when no other is left.
    """
    distances = 1 - unit @ unit.mT
    itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    nearest = distances.masked_fill(itself, math.inf).amin(dim=2) if unit.shape[1] > 1 else distances[..., 0]
    left = torch.where(torch.isfinite(weights), 0.0, -1e30)
    weights = torch.where(torch.isfinite(weights), weights, 0.0)
    chosen = torch.empty(len(unit), k, dtype=torch.int64, device=unit.device)
    for step in range(k):
        latest = torch.argmax(nearest.clamp_min(0) * weights + left, dim=1, keepdim=True)
        chosen[:, step : step + 1] = latest
        left.scatter_(1, latest, -math.inf)
        rows = distances.gather(1, latest.unsqueeze(2).expand(-1, -1, distances.shape[2])).squeeze(1)
        nearest = rows if step == 0 else torch.minimum(nearest, rows)
    return chosen


def tree_roots(unit: Tensor, chosen: Tensor, begins: Tensor, threshold: float, least: int = 0) -> Tensor:
    """(F n,) int64: the token in whose place each token's tree stands; chosen ones are alone.

    Args:
        unit: (F, n, D) rows of length 1.
        chosen: (F, n) bool, tokens that no other may join.
        begins: (F,) bool.
        threshold: Cosine above which a token joins one of the frame before.
        least: Tokens per frame that a segment has to have left, chosen ones among them; the threshold rises for it.
    """
    num_frames, num_cells = chosen.shape
    best = torch.full(chosen.shape, -math.inf, device=unit.device)
    parents = torch.zeros(chosen.shape, dtype=torch.int64, device=unit.device)
    for frame in range(1, num_frames):
        likeness = (unit[frame] @ unit[frame - 1].T).masked_fill(chosen[frame - 1], -math.inf)
        best[frame], parents[frame] = likeness.max(dim=1)
    best.masked_fill_(chosen | begins.unsqueeze(1), -math.inf)
    joins = best > threshold
    for part in segments(begins):
        if best[part].numel() - int(joins[part].sum()) < least * (part.stop - part.start):
            num_surplus = (num_cells - least) * (part.stop - part.start)
            bar = best[part].flatten().topk(num_surplus).values[-1] if num_surplus else math.inf
            joins[part] &= best[part] > bar
    roots = torch.arange(num_frames * num_cells, device=unit.device).view(num_frames, num_cells)
    for frame in range(1, num_frames):
        roots[frame] = torch.where(joins[frame], roots[frame - 1][parents[frame]], roots[frame])
    return roots.flatten()


def _merged(frames: Tensor, chosen: Tensor, roots: Tensor, begins: Tensor, per_frame: int) -> Reduction:
    """Chosen tokens as they are, and `per_frame` clusters a frame of the trees of the others."""
    num_tokens, device = roots.shape[0], roots.device
    tree_sizes = torch.bincount(roots, minlength=num_tokens)
    means = torch.zeros(num_tokens, frames.shape[2], device=device)
    means.index_add_(0, roots, frames.flatten(0, 1).float())
    is_root = (roots == torch.arange(num_tokens, device=device)) & ~chosen.flatten()
    centres, shares = _clusters(means / tree_sizes.unsqueeze(1), is_root.view_as(chosen), begins, per_frame)
    centres = torch.where(chosen.flatten(), roots, centres)
    columns = (centres[roots] >= 0).nonzero().squeeze(1)
    trees = roots[columns]
    keep, rows = centres[trees].unique(return_inverse=True)
    shape = (len(keep), num_tokens)
    weights = shares[trees] / tree_sizes[trees]
    return Reduction(
        keep=keep,
        merge=torch.sparse_coo_tensor(torch.stack([rows, columns]), weights, shape, check_invariants=False),
        sizes=torch.bincount(rows, minlength=len(keep)).float(),
    )


def _clusters(means: Tensor, is_root: Tensor, begins: Tensor, per_frame: int) -> tuple[Tensor, Tensor]:
    """(N,) int64, the token in whose place the cluster of each root stands, -1 for others and where a frame has no
    share; and (N,) float32, what part of its cluster each root makes up.
    """
    centres = torch.full((len(means),), -1, device=means.device)
    shares = torch.ones(len(means), device=means.device)
    counts: list[int] = is_root.sum(dim=1).tolist()
    kept = [n for part in segments(begins) for n in quota(per_frame * (part.stop - part.start), counts[part])]
    for frame, num_kept in enumerate(kept):
        if not num_kept:
            continue
        roots = is_root[frame].nonzero().squeeze(1) + frame * is_root.shape[1]
        picked = labels = torch.arange(len(roots), device=means.device)
        if num_kept < len(roots):
            picked, labels = dpc_knn(means[roots], num_kept, min(NEIGHBOURS, num_kept))
        centres[roots] = roots[picked[labels]]
        shares[roots] = 1 / torch.bincount(labels)[labels].float()
    return centres, shares
