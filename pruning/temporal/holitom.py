"""HoliTom: average what stands still over the stretch of time in which it does, then keep what the tower attends to.

Paper     "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv:2505.21334
          (training-free). Its part outside the decoder; `holitom + fastv` adds a part inside.
Stage     temporal, after the projector; clips only.
Needs     attention_received, of the block that the features come from.
Cost      O(F n D) and O(F^2 n) for the segments; O(n^2 D) per segment for the clusters.
Equation  b_{t,p} = cos(x_{t,p}, x_{t+1,p}) > threshold. Segments of time [s, e] maximise the sum of
          (e - s) * #{p: b_{t,p} for all t in [s, e)}, by dynamic programming; a longer one replaces only for more.
          Cells that stand still in a segment become their mean over it, in the place of its first frame. What is left
          shares the budget in proportion: of a segment's still tokens DPC-kNN makes clusters
          (0.6 centre + 0.4 mean of the others, in the centre's place), of a frame's other tokens those with the
          largest sum_h A[h, j] stay.
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code, which rounds each part of the budget up by itself: shares by largest remainders keep
          the whole within the budget. Less is kept where less is left. No random noise breaks ties between densities.
          Still tokens stand among those of their segment's first frame, in reading order; theirs come before all frames
          of the segment, except in models whose rows end in a newline token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.quota import quota
from mm.data.tokens import PublishedPositions
from mm.plugins.features import ATTENTION_RECEIVED
from mm.plugins.reducer import Count, ReduceContext, Reduction
from pruning.base import Rounding, number_option, top_k_ascending, unit_rows
from pruning.helpers.clips import ClipReducer
from pruning.helpers.clusters import dpc_knn

CENTRE_SHARE = 0.6
NEIGHBOURS = 7


@dataclass(frozen=True, kw_only=True)
class HoliTom(ClipReducer):
    """Average what stands still, keep what the tower attends to (HoliTom).

    Attributes:
        keep_ratio: Most tokens kept / tokens in, in (0, 1].
        threshold: Cosine above which a cell stands still from one frame to the next, -1 to 1; the authors take 0.8,
            and 0.65 to keep a tenth.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED})
    count: ClassVar[Count] = "bounded"
    published_positions: ClassVar[PublishedPositions] = "compact"
    rounding: ClassVar[Rounding] = "half_even"
    threshold: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", number_option("HoliTom", "threshold", self.threshold, -1, 1))

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        attention = context.aux_features[ATTENTION_RECEIVED].float().sum(dim=0).reshape(frames.shape[:2])
        parts = parts_of(still_cells(frames, self.threshold))
        counts = [len(part.cells) for part in parts]
        chosen = [
            _clustered(frames, part, share) if part.last > part.first else _salient(attention, part, share)
            for part, share in zip(parts, quota(min(k, sum(counts)), counts), strict=True)
            if share
        ]
        return _joined(chosen, attention.numel())


def still_cells(frames: Tensor, threshold: float) -> Tensor:
    """(F - 1, n) bool: whether each cell of `frames` (F, n, D) stays what it is until the next frame."""
    unit = unit_rows(frames)
    return (unit[1:] * unit[:-1]).sum(dim=-1) > threshold


def segments(still: Tensor) -> list[tuple[int, int]]:
    """First and last frame of each segment of a clip, in order, for which the most tokens can be averaged away.

    Args:
        still: (F - 1, n) bool, on the CPU.
    """
    num_frames = still.shape[0] + 1
    best, starts = [0] * num_frames, list(range(num_frames))
    # gains[s][j]: tokens saved by the segment from s to s + 1 + j.
    gains = [_gains(still[start:]) for start in range(num_frames - 1)]
    for end in range(1, num_frames):
        best[end] = best[end - 1]
        for start in range(end - 1, -1, -1):
            total = (best[start - 1] if start else 0) + gains[start][end - start - 1]
            if total > best[end]:
                best[end], starts[end] = total, start
    found, end = [], num_frames - 1
    while end >= 0:
        found.append((starts[end], end))
        end = starts[end] - 1
    return found[::-1]


def _gains(still: Tensor) -> list[int]:
    lasting = still.int().cummin(dim=0).values.sum(dim=1)
    return (lasting * torch.arange(1, len(still) + 1)).tolist()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens that share a part of the budget: the still cells of a segment, or the others of one frame.

    Attributes:
        first, last: Frames; equal for the cells that are not still.
        cells: (m,) int64, ascending.
    """

    first: int
    last: int
    cells: Tensor


@dataclass(frozen=True, kw_only=True)
class PartReduction:
    """What becomes of a part: k kept tokens, and the m entries of their merge weights.

    Attributes:
        keep: (k,) int64 token indices.
        rows, columns: (m,) int64: which of `keep`, and which token goes into it.
        weights: (m,) float32.
    """

    keep: Tensor
    rows: Tensor
    columns: Tensor
    weights: Tensor


def parts_of(still: Tensor) -> list[Part]:
    """Parts that hold tokens, in order of time; `still` (F - 1, n) as from `still_cells`."""
    found = []
    for first, last in segments(still.cpu()):
        stays = still[first:last].all(dim=0) if last > first else torch.zeros_like(still[0:1].any(dim=0))
        found.append(Part(first=first, last=last, cells=stays.nonzero().squeeze(1)))
        moving = (~stays).nonzero().squeeze(1)
        found += [Part(first=frame, last=frame, cells=moving) for frame in range(first, last + 1)]
    return [part for part in found if len(part.cells)]


def _salient(attention: Tensor, part: Part, k: int) -> PartReduction:
    cells = part.cells[top_k_ascending(attention[part.first, part.cells], k)]
    keep = part.first * attention.shape[1] + cells
    return PartReduction(
        keep=keep, rows=torch.arange(k, device=keep.device), columns=keep, weights=torch.ones(k).to(keep.device)
    )


def _clustered(frames: Tensor, part: Part, k: int) -> PartReduction:
    """The segment's means over time, thinned to `k` by clusters."""
    stretch = frames[part.first : part.last + 1, part.cells].float()
    num_frames, num_cells = stretch.shape[:2]
    centres = labels = torch.arange(num_cells, device=frames.device)
    if k < num_cells:
        centres, labels = dpc_knn(stretch.mean(dim=0), k, min(NEIGHBOURS, k))
    shares = _shares(centres, labels) / num_frames
    starts = torch.arange(part.first, part.last + 1, device=frames.device) * frames.shape[1]
    return PartReduction(
        keep=part.first * frames.shape[1] + part.cells[centres],
        rows=labels.repeat(num_frames),
        columns=(starts.unsqueeze(1) + part.cells).flatten(),
        weights=shares.repeat(num_frames),
    )


def _shares(centres: Tensor, labels: Tensor) -> Tensor:
    """(m,) float32: how much of its cluster's token each row makes up."""
    others = torch.bincount(labels, minlength=len(centres))[labels] - 1
    shares = (1 - CENTRE_SHARE) / others.clamp_min(1)
    shares[centres] = torch.where(others[centres] > 0, CENTRE_SHARE, 1.0)
    return shares


def _joined(parts: list[PartReduction], num_tokens: int) -> Reduction:
    keep, order = torch.cat([part.keep for part in parts]).sort()
    row_of, device = torch.argsort(order), keep.device
    firsts = [sum(len(part.keep) for part in parts[:i]) for i in range(len(parts))]
    rows = row_of[torch.cat([part.rows + first for part, first in zip(parts, firsts, strict=True)])]
    columns, weights = torch.cat([part.columns for part in parts]), torch.cat([part.weights for part in parts])
    shape = (len(keep), num_tokens)
    return Reduction(
        keep=keep,
        merge=torch.sparse_coo_tensor(torch.stack([rows, columns]), weights, shape, check_invariants=False),
        sizes=torch.bincount(rows, minlength=len(keep)).float().to(device),
    )
