"""DivPrune: keep the tokens that differ most from one another.

Paper     "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025 (training-free).
Stage     pre_llm, after the projector; within each crop or frame, or over all of them (`joint`).
Needs     nothing but the embeddings.
Cost      O(N^2 D) for the similarities, O(k N) for the selection with a running minimum.
Equation  d(i, j) = 1 - cos(x_i, x_j). First argmax_i min_{j != i} d(i, j), the token whose nearest neighbour is
          farthest; then, k - 1 times, argmax over the tokens not yet chosen of min_{c chosen} d(i, c).
          Kept in reading order; the lowest index wins a tie.
Positions authors: numbered anew (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code: no token is chosen twice (theirs repeats index 0 once only duplicates are left);
          everything is computed in float32 whatever the model's dtype; each crop has its share of the budget, where
          theirs selects over all crops of a picture at once, as `joint` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions
from pruning.base import Rounding
from pruning.helpers.products import product_with
from pruning.helpers.steps import Step, StepReducer

MAX_MATRIX_TOKENS = 8192
"""Up to here all N * N similarities are held (256 MiB at the limit); beyond, rows are computed one by one."""

BLOCK_ROWS = 128
"""Fastest of 128 to 960 on one core; larger blocks compute more of the half that is copied."""


@dataclass(frozen=True, kw_only=True)
class DivPrune(StepReducer):
    """Keep the tokens that differ most from one another (greedy max-min cosine distance).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        joint: Choose over all crops or frames of an item at once, instead of giving each its share.
    """

    rounding: ClassVar[Rounding] = "half_even"
    published_positions: ClassVar[PublishedPositions] = "compact"

    def pick(self, step: Step, k: int) -> Tensor:
        return pick_order(step.embeddings, k)


@torch.no_grad()
def pick_order(embeddings: Tensor, k: int) -> Tensor:
    """(k,) int64: the chosen indices of `embeddings` (N, D) in the order they are chosen, for 0 < k <= N.

    Works with similarities: the farthest token is the one whose largest similarity to a chosen one is smallest. A row
    that is not finite is chosen only when no other is left.
    """
    unit, broken = _unit_rows(embeddings)
    num_tokens = unit.shape[0]
    rows = _Matrix(unit) if num_tokens <= MAX_MATRIX_TOKENS else _Rows(unit)
    chosen = torch.empty(k, dtype=torch.int64, device=unit.device)
    closest = rows.nearest_neighbour().masked_fill_(broken, SEEN_BROKEN)
    torch.argmin(closest, dim=0, out=chosen[0])
    closest = torch.full_like(closest, -math.inf).masked_fill_(broken, SEEN_BROKEN)
    for step in range(1, k):
        # A token's similarity to itself is stored as infinite, so a chosen one can never be the smallest again.
        torch.maximum(closest, rows.similarity(chosen[step - 1 : step]), out=closest)
        torch.argmin(closest, dim=0, out=chosen[step])
    return chosen


SEEN_BROKEN = 1e30
"""Stands for the similarity of a row that is not finite: above every cosine, below the infinity of a chosen token."""


def _unit_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 in float32, zero where not finite, and the (N,) mask of the latter."""
    rows = embeddings.float()
    norms = torch.linalg.vector_norm(rows, dim=1)
    broken = ~torch.isfinite(norms)
    unit = rows / norms.clamp_min(1e-12).unsqueeze(1)
    return unit.masked_fill_(broken.unsqueeze(1), 0.0), broken


class _Matrix:
    """All similarities at once: fastest, memory O(N^2)."""

    def __init__(self, unit: Tensor) -> None:
        num_tokens = unit.shape[0]
        self.similarities = unit.new_empty(num_tokens, num_tokens)
        for start in range(0, num_tokens, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, num_tokens)
            # The matrix is symmetric: half of it is computed, the other half copied.
            self.similarities[start:, start:stop] = product_with(unit[start:stop], unit[start:])
            self.similarities[start:stop, stop:] = self.similarities[stop:, start:stop].T
        self.similarities.fill_diagonal_(-math.inf)

    def nearest_neighbour(self) -> Tensor:
        """(N,): each token's largest similarity to another."""
        nearest = self.similarities.amax(dim=1)
        self.similarities.fill_diagonal_(math.inf)
        return nearest

    def similarity(self, index: Tensor) -> Tensor:
        """(N,): similarities to the token at `index` (1,), infinite at itself."""
        return self.similarities.index_select(0, index).squeeze(0)


class _Rows:
    """One row at a time: memory O(N D)."""

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit

    def nearest_neighbour(self) -> Tensor:
        nearest = self.unit.new_empty(self.unit.shape[0])
        for start in range(0, self.unit.shape[0], BLOCK_ROWS):
            block = self.unit[start : start + BLOCK_ROWS] @ self.unit.T
            block[:, start : start + BLOCK_ROWS].fill_diagonal_(-math.inf)
            torch.amax(block, dim=1, out=nearest[start : start + BLOCK_ROWS])
        return nearest

    def similarity(self, index: Tensor) -> Tensor:
        row = torch.mv(self.unit, self.unit.index_select(0, index).squeeze(0))
        return row.index_fill_(0, index, math.inf)
