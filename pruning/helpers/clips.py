"""Reducers of clips: frames of equal grids in order of time, every cell of them there; and segments of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.arrays import ints
from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.plugins.reducer import ReduceContext, Reduction, Stage
from pruning.base import BudgetReducer, keep_all, unit_rows


@dataclass(frozen=True, kw_only=True)
class ClipReducer(BudgetReducer):
    """A reducer that looks at all frames of a clip. Images, whose steps are crops, stay as they are.

    Subclasses write `decide`, and `num_kept` where it is not the budget.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.TEMPORAL,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"video"})
    needs_grid: ClassVar[bool] = True

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        if kind != "video" or not num_tokens:
            return num_tokens
        frames, height, width = grid or (1, 1, num_tokens)
        return self.num_kept(frames, height * width)

    def num_kept(self, num_frames: int, num_per_frame: int) -> int:
        """Tokens kept of a clip that has some, or the most that may be."""
        return super().plan(num_frames * num_per_frame)

    @torch.no_grad()
    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        k = self.plan(tokens.num_tokens, tokens.grid, tokens.kind)
        if k >= tokens.num_tokens:
            return keep_all(tokens)
        return self.decide(tokens.embeddings.unflatten(0, (tokens.grid[0], -1)), context, k)

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        """What becomes of the tokens of `frames` (F, n, D), of which `k` stay, with 0 < k < F n."""
        raise NotImplementedError


def num_segments(num_frames: int) -> int:
    """Segments that a clip has at least: one for each four frames, at most the authors' 8."""
    return min(8, max(1, num_frames // 4))


def beginnings(frames: Tensor, threshold: float, min_segments: int) -> Tensor:
    """(F,) bool: whether a segment of time begins with each frame of `frames` (F, n, D)."""
    means = unit_rows(frames.float().mean(dim=1))
    alike = (means[1:] * means[:-1]).sum(dim=-1)
    begins = torch.cat([alike.new_ones(1, dtype=torch.bool), alike < threshold])
    # Those below the threshold are the least alike: taking the first so many adds only where they are too few.
    least = torch.sort(alike, stable=True).indices[: max(min_segments - 1, 0)]
    begins[least + 1] = True
    return begins


def segments(begins: Tensor) -> list[slice]:
    """The frames of each segment."""
    starts = ints(begins.nonzero().squeeze(1))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(begins)], strict=True)]
