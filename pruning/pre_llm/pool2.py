"""Pool2: the mean of every 2 x 2 neighbouring tokens. A baseline every method has to beat at a quarter of the tokens.

Stage     pre_llm, after the projector.
Cost      O(N D).
Equation  each 2 x 2 block of cells of one image, crop or frame becomes its mean, in the place of its first cell; at a
          border of odd length, the mean of the cells that exist. Frames of a clip are not mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.plugins.reducer import ReduceContext, Reduction, Stage
from pruning.base import BaseReducer, keep_all, merge_means


@dataclass(frozen=True, kw_only=True)
class Pool2(BaseReducer):
    """Average every 2 x 2 neighbouring tokens."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    needs_grid: ClassVar[bool] = True

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        t, h, w = grid or (1, 1, num_tokens)
        return t * ((h + 1) // 2) * ((w + 1) // 2)

    @torch.no_grad()
    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        keep, rows = _blocks(tokens.grid, tokens.positions)
        if keep.shape[0] == tokens.num_tokens:
            return keep_all(tokens)
        return merge_means(keep, rows, torch.arange(tokens.num_tokens, device=rows.device), tokens.sizes)


def _blocks(grid: Grid, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The first cell of each block (k,), and the block of each cell (N,), of a whole grid."""
    t, h, w = grid
    device = positions.device
    step, row, column = positions.unbind(dim=1)
    blocks = (step * ((h + 1) // 2) + row // 2) * ((w + 1) // 2) + column // 2
    cells = torch.arange(t * h * w, device=device).reshape(grid)
    return cells[:, ::2, ::2].flatten(), blocks
