"""EVS: keep the first frame, and of the others what changed since the frame before.

Paper     "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv:2510.14624
          (training-free).
Stage     temporal, after the projector; clips only.
Needs     nothing but the embeddings.
Cost      O(F n D).
Equation  d(t, p) = 1 - cos(x_{t,p}, x_{t-1,p}) for t >= 1: the same cell one frame earlier, kept or not; the first
          frame counts as changed. Keep the max(n, floor(F n keep_ratio)) largest d, in order; the earliest wins a tie.
Positions authors: kept; here kept.
Differs   from the paper, which compares pixels against a percentile: as in vLLM, projected tokens are compared and the
          count is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.plugins.reducer import ReduceContext, Reduction
from pruning.base import Rounding, budget, top_k_ascending, unit_rows
from pruning.helpers.clips import ClipReducer

FIRST_FRAME = 255.0
"""Above every cosine distance."""


@dataclass(frozen=True, kw_only=True)
class EVS(ClipReducer):
    """Keep the first frame, and of the others what changed (EVS).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1]; never less than one frame.
    """

    rounding: ClassVar[Rounding] = "floor_complement"

    def num_kept(self, num_frames: int, num_per_frame: int) -> int:
        return max(num_per_frame, budget(num_frames * num_per_frame, self.keep_ratio, self.rounding))

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        return Reduction(keep=top_k_ascending(changes(frames).flatten(), k))


def changes(frames: Tensor) -> Tensor:
    """(F, n) float32: how much each token of `frames` (F, n, D) differs from the one before it in time.

    One that is not finite comes last in order of change, also in the first frame.
    """
    unit = unit_rows(frames)
    first = torch.full_like(unit[:1, :, 0], FIRST_FRAME)
    changed = torch.cat([first, 1 - (unit[1:] * unit[:-1]).sum(dim=-1)])
    return changed.masked_fill(~torch.isfinite(frames).all(dim=-1), -math.inf)
