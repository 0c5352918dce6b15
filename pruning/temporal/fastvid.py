"""FastVID: keep what the tower attends to, and merge the rest of a segment of time into a few dense tokens.

Paper     "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025, arXiv:2503.11187
          (training-free).
Stage     temporal, after the projector; clips only.
Needs     attention_received, of the block that the features come from.
Cost      O(F n^2 D) for the densities, O(F n c D) for the assignment.
Equation  a segment of time begins where frame features have a cosine below `segment_threshold`, and at the least alike
          of them until there are `min_segments`. Of a frame's m = floor(n keep_ratio) tokens, m - floor(m
          context_share) are those with the most attention. The others of the segment's budget are context tokens on
          every `anchor_stride`-th frame, counted from the segment's last: the tokens not yet kept with the largest
          rho_i delta_i, rho_i = exp(-mean of the 4 smallest |x_i - x_j|^2 / D), delta_i the smallest distance to a
          denser token. Each token of the segment that attention did not keep joins on each such frame the context token
          with the largest cosine; of n that joined x' = w x + (1 - w) mean of them, w = max(centre_share, 1 / (1 + n)).
Positions authors: kept; here kept.
Differs   from the authors' code: frame features are the means of a frame's tokens, where theirs come from the tower's
          pooling head, as does its attention; what the division over a segment's frames leaves, and what a frame has
          no tokens for, goes to its other frames, the latest first, where theirs leaves the first unspent and fails
          on the second. A context token always joins itself. No random noise breaks ties between densities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.plugins.features import ATTENTION_RECEIVED
from mm.plugins.reducer import ReduceContext, Reduction
from pruning.base import Rounding, budget, int_option, number_option, top_k_ascending, unit_rows
from pruning.helpers.clips import ClipReducer, beginnings, num_segments, segments
from pruning.helpers.clusters import density_peaks, distances_between

NEIGHBOURS = 4


@dataclass(frozen=True, kw_only=True)
class FastVID(ClipReducer):
    """Keep what the tower attends to, merge the rest of each segment of time into dense tokens (FastVID).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1]; rounded down in each frame.
        context_share: Share of the kept tokens that others are merged into, 0 to 1.
        anchor_stride: Each so many frames of a segment one has context tokens; at least 1.
        centre_share: Least weight of a context token among those that joined it, 0 to 1.
        segment_threshold: Cosine of frame features below which a segment of time begins, -1 to 1.
        min_segments: A clip has at least so many segments, or as many as frames. 0 is one for each four frames and at
            most 8, which is 8 for the authors' clips.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED})
    rounding: ClassVar[Rounding] = "floor"
    context_share: float = 0.4
    anchor_stride: int = 4
    centre_share: float = 0.6
    segment_threshold: float = 0.9
    min_segments: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low in (("context_share", 0), ("centre_share", 0), ("segment_threshold", -1)):
            object.__setattr__(self, option, number_option("fastvid", option, getattr(self, option), low, 1))
        int_option("fastvid", "anchor_stride", self.anchor_stride, 1, 1_000_000)
        int_option("fastvid", "min_segments", self.min_segments, 0, 1_000_000)

    def num_kept(self, num_frames: int, num_per_frame: int) -> int:
        return num_frames * budget(num_per_frame, self.keep_ratio, self.rounding)

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        num_frames, num_cells, _ = frames.shape
        attention = context.aux_features[ATTENTION_RECEIVED].float().sum(dim=0).reshape(num_frames, num_cells)
        attention = attention.masked_fill(~torch.isfinite(frames).all(dim=-1), -torch.inf)
        per_frame = k // num_frames
        num_context = int(per_frame * self.context_share)
        salient = torch.stack([top_k_ascending(row, per_frame - num_context) for row in attention])
        cells = torch.arange(num_frames * num_cells, device=frames.device).view(num_frames, num_cells)
        is_left = torch.ones_like(cells, dtype=torch.bool).scatter_(1, salient, False)
        left = cells[is_left].view(num_frames, -1)
        kept = cells.gather(1, salient).flatten()
        parts = [_own(kept)]
        begins = beginnings(frames, self.segment_threshold, self.min_segments or num_segments(num_frames))
        rows = frames.flatten(0, 1).float()
        for part in segments(begins) if num_context else []:
            parts += self._merged(rows, left[part], num_context * (part.stop - part.start))
        return _joined(parts, rows.shape[0])

    def _merged(self, rows: Tensor, left: Tensor, total: int) -> list[tuple[Tensor, Tensor]]:
        """Context tokens and merge weights on the frames of one segment, see `_joined`.

        Args:
            left: (L, m) int64, the tokens of each of its frames that attention did not keep.
            total: How many context tokens it has.
        """
        found: list[tuple[Tensor, Tensor]] = []
        members = left.flatten()
        unit = unit_rows(rows[members])
        for frame, count in enumerate(spread(total, len(left), left.shape[1], self.anchor_stride)):
            if not count:
                continue
            scores = density_peaks(distances_between(rows[left[frame]]), NEIGHBOURS)
            picked = top_k_ascending(scores, count) + frame * left.shape[1]
            joins = (unit @ unit[picked].T).argmax(dim=1)
            joins[picked] = torch.arange(count, device=rows.device)
            sizes = torch.bincount(joins, minlength=count).float()
            own = torch.clamp_min(1 / (1 + sizes), self.centre_share)
            weights = torch.zeros(count, len(members), device=rows.device)
            weights[joins, torch.arange(len(members), device=rows.device)] = ((1 - own) / sizes)[joins]
            weights[torch.arange(count), picked] += own
            sparse = weights.to_sparse()
            places = torch.stack([sparse.indices()[0], members[sparse.indices()[1]]])
            found.append((members[picked], torch.cat([places.double(), sparse.values().double().unsqueeze(0)])))
        return found


def spread(total: int, num_frames: int, room: int, stride: int) -> list[int]:
    """How many of `total` context tokens each frame of a segment has: its anchors equally, others what is too much.

    Args:
        room: Tokens that a frame has for it.
        stride: Anchors are each so many frames, counted from the last.
    """
    counts = [0] * num_frames
    from_last = list(range(num_frames - 1, -1, -1))
    anchors = from_last[::stride]
    for frames in (anchors, from_last):
        while total:
            free = [frame for frame in frames if counts[frame] < room]
            if not free:
                break
            share, extra = divmod(total, len(free))
            for i, frame in enumerate(free):
                given = min(room - counts[frame], share + (i < extra))
                counts[frame] += given
                total -= given
    return counts


def _own(kept: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(kept), device=kept.device)
    return kept, torch.stack([rows, kept, torch.ones_like(kept)]).double()


def _joined(parts: list[tuple[Tensor, Tensor]], num_tokens: int) -> Reduction:
    """One decision from parts: kept tokens (c,), and (3, m) the row, the token and the weight of each entry."""
    firsts, first = [], 0
    for kept, _ in parts:
        firsts.append(first)
        first += len(kept)
    keep, order = torch.cat([kept for kept, _ in parts]).sort()
    row_of = torch.argsort(order)
    rows = row_of[torch.cat([entries[0].long() + at for (_, entries), at in zip(parts, firsts, strict=True)])]
    columns = torch.cat([entries[1].long() for _, entries in parts])
    weights = torch.cat([entries[2].float() for _, entries in parts])
    # A token that several context tokens share counts for each by the part of it that goes there.
    totals = torch.zeros(num_tokens, device=keep.device).index_add_(0, columns, weights)
    sizes = torch.zeros(len(keep), device=keep.device).index_add_(0, rows, weights / totals[columns])
    shape = (len(keep), num_tokens)
    merge = torch.sparse_coo_tensor(torch.stack([rows, columns]), weights, shape, check_invariants=False)
    return Reduction(keep=keep, merge=merge, sizes=sizes)
