"""SCOPE: keep salient tokens that together cover the others.

Paper     "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025,
          arXiv:2510.24214 (training-free).
Stage     pre_llm, after the projector; within each crop or frame.
Needs     attention_received and tower_features: what the tower saw, before the projector.
Cost      O(N^2 d) for the similarities, O(k N^2) elementwise for the selection.
Equation  C = cos(Z, Z), v = 0; k times: argmax over the tokens not yet chosen of
          (sum_i max(0, C_ij - v_i)) * a_j^alpha, then v = max(v, C_.j); a_j = sum_h A[h, j].
Positions authors: numbered anew (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code in the split of a budget over crops: by largest remainders, where theirs loses some to
          an integer division; without [CLS] the attention is the mean over all tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions
from mm.errors import InvalidOption
from mm.plugins.features import ATTENTION_RECEIVED, TOWER_FEATURES
from pruning.base import unit_rows
from pruning.helpers.steps import Step, StepReducer


@dataclass(frozen=True, kw_only=True)
class Scope(StepReducer):
    """Keep salient tokens that together cover the others (SCOPE).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        alpha: How much saliency counts against coverage, at least 0; 0 is coverage alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED, TOWER_FEATURES})
    published_positions: ClassVar[PublishedPositions] = "compact"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha < math.inf:
            raise InvalidOption("Scope", "alpha", f"has to be a number of at least 0, got {self.alpha!r}")

    def pick(self, step: Step, k: int) -> Tensor:
        saliency = step.aux_features[ATTENTION_RECEIVED].float().sum(dim=0) ** self.alpha
        return pick_order(step.aux_features[TOWER_FEATURES].T, saliency, k)[0]


@torch.no_grad()
def pick_order(features: Tensor, saliency: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(k,) int64 and (k,) float32: the chosen of `features` (N, d) in the order they are chosen, and their gains.

    The lowest index wins a tie. A token whose saliency is not finite is chosen only when no other is left.
    """
    unit = unit_rows(features)
    similarity = unit @ unit.T
    gain_ceiling = torch.where(torch.isfinite(saliency), 0.0, BROKEN)
    saliency = torch.where(torch.isfinite(saliency), saliency, 0.0)
    covered = similarity.new_zeros(similarity.shape[0])
    chosen = torch.empty(k, dtype=torch.int64, device=unit.device)
    gains, coverage = similarity.new_empty(k), torch.empty_like(covered)
    buffer = similarity.new_empty(min(BLOCK_ROWS, similarity.shape[0]), similarity.shape[1])
    for step in range(k):
        # Rows are what is covered, and the matrix is symmetric: column j is row j.
        for start in range(0, similarity.shape[0], BLOCK_ROWS):
            rows = similarity[start : start + BLOCK_ROWS]
            uncovered = torch.sub(rows, covered, out=buffer[: rows.shape[0]]).clamp_min_(0)
            torch.sum(uncovered, dim=1, out=coverage[start : start + BLOCK_ROWS])
        gain = coverage * saliency + gain_ceiling
        torch.max(gain, dim=0, out=(gains[step], chosen[step]))
        latest = chosen[step : step + 1]
        torch.maximum(covered, similarity.index_select(0, latest).squeeze(0), out=covered)
        gain_ceiling.index_fill_(0, latest, -math.inf)
    return chosen, gains


BLOCK_ROWS = 256
"""What is not covered yet is computed for so many tokens at a time: a second N x N matrix would only be memory."""

BROKEN = -1e30
"""Ranks a token below all others, and above those that are chosen."""
