"""HoloV: spread the budget over crops of the picture, and keep in each what the tower attends to.

Paper     "Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025,
          arXiv:2510.02912 (training-free).
Stage     pre_llm, after the projector; within each crop or frame of the model.
Needs     attention_received, of the block that the features come from.
Cost      O(N^2 D / P) for the similarities, O(N log N).
Equation  the N tokens in reading order are cut into P runs of equal length, the first N mod P of them longer by one.
          In a run of n: v_j = sum_i (c_ij - m_j)^2 / (n - 1), with c_ij = cos(x_i, x_j), c_jj = 0 and
          m_j = sum_i c_ij / (n - 1); s_j = 1000 a_j + 0.09 v_j mean|1000 a| / mean|v|, with a_j = mean_h A[h, j]. With
          w_p the mean s of run p over the sum of all such means, run p keeps floor(k w_p) tokens, and the runs with the
          largest w_p one more until k are given away. Each run keeps those with the largest a_j.
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code in three places where theirs leaves the budget: tokens that a run is too short for go
          to the other runs by w_p, where theirs fills up with zeros; kept tokens stay in reading order, where theirs
          puts each run's in order of attention; a run of one token scores as any other. Score and choice follow the
          code: in it v_j weighs in the shares alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions
from mm.plugins.features import ATTENTION_RECEIVED
from pruning.base import int_option, number_option, top_k_ascending, unit_rows
from pruning.helpers.steps import Step, StepReducer

ATTENTION_SCALE = 1e3
TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class HoloV(StepReducer):
    """Spread the budget over crops, keep in each what the tower attends to (HoloV).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        num_crops: Runs that the tokens are cut into; at most as many as tokens. The authors take 16 of 576 tokens.
        variance_share: How much the variance of similarities counts against attention, 0 to 100.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED})
    published_positions: ClassVar[PublishedPositions] = "compact"
    num_crops: int = 16
    variance_share: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        int_option("holov", "num_crops", self.num_crops, 1, 1_000_000)
        share = number_option("holov", "variance_share", self.variance_share, 0, 100)
        object.__setattr__(self, "variance_share", share)

    def pick(self, step: Step, k: int) -> Tensor:
        attention = step.aux_features[ATTENTION_RECEIVED].float().mean(dim=0)
        usable = torch.isfinite(attention) & torch.isfinite(step.embeddings).all(dim=1)
        runs = crops(len(attention), self.num_crops)
        weighed = torch.where(usable, attention, 0.0)
        scores = [crop_score(step.embeddings[run], weighed[run], self.variance_share) for run in runs]
        counts = allocate(k, torch.stack(scores), [run.stop - run.start for run in runs])
        ranked = torch.where(usable, attention, -torch.inf)
        kept = [top_k_ascending(ranked[run], n) + run.start for run, n in zip(runs, counts, strict=True)]
        return torch.cat(kept)


def crops(num_tokens: int, num_crops: int) -> list[slice]:
    """Runs of consecutive tokens, as many as there are tokens at most; the first ones are longer by one."""
    num_crops = min(num_crops, num_tokens)
    size, longer = divmod(num_tokens, num_crops)
    starts = [i * size + min(i, longer) for i in range(num_crops + 1)]
    return [slice(starts[i], starts[i + 1]) for i in range(num_crops)]


def crop_score(embeddings: Tensor, attention: Tensor, variance_share: float) -> Tensor:
    """The mean score of one run's tokens (n, D) with attention (n,)."""
    scaled, num_others = attention * ATTENTION_SCALE, len(attention) - 1
    if not num_others:
        return scaled.mean()
    unit = unit_rows(embeddings)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    means = cosines.sum(dim=1, keepdim=True) / num_others
    variances = (cosines - means).square().sum(dim=1) / num_others
    scale = scaled.abs().mean() / (variances.abs().mean() + TINY)
    return (scaled + variance_share * scale * variances).mean()


def allocate(k: int, scores: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many of `k` tokens each run of `sizes` keeps, by its score."""
    weights = scores.clamp_min(0)
    weights = weights / (weights.sum() + TINY)
    counts: list[int] = (weights * k).floor().long().tolist()
    ranked: list[int] = torch.sort(weights, descending=True, stable=True).indices.tolist()
    for run in ranked[: max(0, k - sum(counts))]:
        counts[run] += 1
    counts = [min(count, size) for count, size in zip(counts, sizes, strict=True)]
    while (missing := k - sum(counts)) > 0:
        room = [run for run in ranked if counts[run] < sizes[run]]
        for run in room[:missing]:
            counts[run] += 1
    return counts
