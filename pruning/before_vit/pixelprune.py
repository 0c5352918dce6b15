"""PixelPrune: cells of a picture that their neighbours predict never enter the tower.

Paper     "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", arXiv:2604.00886
          (training-free).
Stage     before_vit, on pixels: the only one that saves the tower all its work on what is dropped.
Needs     patches: a tower whose patches are independent until the first attention.
Cost      O(N P) for N cells of P pixel values.
Equation  a cell x with the neighbours a (left), b (above) and c (above left) is predicted by b where c resembles a and
          not b (a vertical edge), and else by a; in the first row by a, in the first column by b. It is dropped where
          max|x - prediction| <= tau, and stands for its prediction from then on, so that errors do not add up. In a
          clip a cell is also dropped where it resembles what its place showed one step earlier. The first cell stays.
Positions authors: kept; here kept.
Differs   from the authors' code, which takes each frame of a clip as a picture of its own. Its `max` metric is the one
          here. Pictures are compared after resizing, as there. How much is kept depends on the picture. Photographs
          lose only cells that repeat to the last bit at tau = 0, such as a black sky: 176 of 200 crops of 11
          photographs kept all cells, and all 200 crops of the 8 without such areas did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid
from mm.plugins.features import PATCHES
from mm.plugins.reducer import Count, Stage
from pruning.base import BaseReducer, number_option

FEW_VALUES = 16


@dataclass(frozen=True, kw_only=True)
class PixelPrune(BaseReducer):
    """Leave out cells that their neighbours predict, before the tower (PixelPrune).

    Attributes:
        tau: Largest difference of a pixel's value from what is predicted, of a range from 0 to 1; 0 drops only equal
            ones.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.BEFORE_VIT,)
    needs: ClassVar[frozenset[str]] = frozenset({PATCHES})
    count: ClassVar[Count] = "bounded"
    tau: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", number_option("pixelprune", "tau", self.tau, 0, 1))

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """At most all: how many depends on the picture."""
        return num_tokens

    @torch.no_grad()
    def keep_cells(self, pixels: Tensor) -> Tensor:
        """See `mm.plugins.reducer.BeforeTower`."""
        kept: list[Tensor] = []
        before = None
        for frame in pixels:
            keep, before = unpredicted(frame, before, self.tau)
            kept.append(keep)
        return torch.stack(kept)


def unpredicted(frame: Tensor, before: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """(h, w) bool, the cells that nothing predicts, and (h, w, n), what each cell then stands for.

    Args:
        frame: (h, w, n).
        before: What the cells of the frame before stand for; None for the first.
    """
    height, width, _ = frame.shape
    keep, shown = torch.ones(height, width, dtype=torch.bool, device=frame.device), frame.clone()
    if before is not None:
        is_still = _alike(frame, before, tau)
        shown[is_still], keep[is_still] = before[is_still], False
    if not _has_alike(shown, tau):
        return keep, shown
    if not tau:  # what a cell stands for is the cell itself
        sides = [torch.arange(size, device=frame.device) for size in (height, width)]
        row, column = torch.meshgrid(sides, indexing="ij")
        _, fits = _predicted(frame, shown, row, column, tau)
        fits[0, 0] = False
        return keep & ~fits, shown
    # Cells of one diagonal do not depend on one another.
    for diagonal in range(1, height + width - 1):
        row = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=frame.device)
        column = diagonal - row
        predicted, fits = _predicted(frame, shown, row, column, tau)
        fits &= keep[row, column]
        keep[row[fits], column[fits]] = False
        shown[row[fits], column[fits]] = predicted[fits]
    return keep, shown


def _predicted(frame: Tensor, shown: Tensor, row: Tensor, column: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """What the cells at `row` and `column` are predicted to be (..., n), and whether they are that."""
    left, above = shown[row, (column - 1).clamp_min(0)], shown[(row - 1).clamp_min(0), column]
    corner = shown[(row - 1).clamp_min(0), (column - 1).clamp_min(0)]
    is_vertical = _alike(corner, left, tau) & ~_alike(corner, above, tau)
    from_above = torch.where((row > 0) & (column > 0), is_vertical, column == 0)
    predicted = torch.where(from_above.unsqueeze(-1), above, left)
    return predicted, _alike(frame[row, column], predicted, tau)


def _has_alike(cells: Tensor, tau: float) -> bool:
    """Whether any cell resembles the one left of it or above it. A few values of each cell are looked at first."""
    for ours, others in ((cells[:, 1:], cells[:, :-1]), (cells[1:], cells[:-1])):
        near = _alike(ours[..., :FEW_VALUES], others[..., :FEW_VALUES], tau)
        if near.any() and _alike(ours[near], others[near], tau).any():
            return True
    return False


def _alike(a: Tensor, b: Tensor, tau: float) -> Tensor:
    return (a - b).abs().amax(dim=-1) <= tau
