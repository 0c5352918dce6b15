"""CDPruner: keep tokens that differ from one another and bear on the question.

Paper     "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025,
          arXiv:2506.10967 (training-free).
Stage     pre_llm, after the projector; within each crop or frame; depends on the question.
Needs     text_embeddings: the question as the decoder embeds it; with relevance="clip" clip_embeddings and clip_text.
Cost      O(N^2 D) for the similarities, O(k^2 N) for the selection.
Equation  S = cos(X, X); r_j = sign * mean_m cos(x_j, text_m), brought to (r - min + 1e-6) / (max - min) over the item.
          Greedy maximum of det over subsets of diag(r) S diag(r): with h_j what is left of S_jj after a Cholesky
          factorisation over the chosen, k times c = argmax r_j^2 h_j; e_j = (S_cj - l_c . l_j) / sqrt(h_c), which is
          added to l_j; h_j -= e_j^2.
Positions authors: numbered anew (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code, which scores relevance by CLIP's text tower and projections, negated. That is
          relevance="clip", for a LLaVA checkpoint with the CLIP of its tower in its folder `clip`. No published folder
          has one, so "decoder" is the default: the cosine with the decoder's own text embeddings, not negated, as with
          -1 the shipped model had 9 points less of 280 held-out questions right at a tenth of the tokens, and 11 at a
          quarter. Relevance is brought to its range over one item and not over a batch. The factor r is kept out of the
          factorisation, which changes no result. Where rounding leaves nothing of h, the rest is filled up by
          relevance, so no NaN can spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.features import CLIP_EMBEDDINGS, CLIP_TEXT, TEXT_EMBEDDINGS
from mm.plugins.reducer import ReduceContext
from pruning.base import choice_option, unit_rows
from pruning.helpers.steps import Step, StepReducer

SIGNS = {"decoder": 1, "clip": -1}

EXHAUSTED = 1e-5
"""Residuals below this are rounding: float32 keeps about 1e-7 of the 1 they start from, times the subtractions."""


@dataclass(frozen=True, kw_only=True)
class CDPruner(StepReducer):
    """Keep tokens that differ from one another and bear on the question (CDPruner).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        relevance: "decoder" compares tokens with the question as the decoder embeds it, "clip" as CLIP does.
        relevance_sign: 1 takes what is similar to the question as relevant, -1 what is not. If not given, 1 for
            "decoder", and -1 for "clip", which the authors take.
    """

    needs: ClassVar[frozenset[str]] = frozenset({TEXT_EMBEDDINGS})
    query_aware: ClassVar[bool] = True
    published_positions: ClassVar[PublishedPositions] = "compact"
    relevance: str = "decoder"
    relevance_sign: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice_option("CDPruner", "relevance", self.relevance, ("decoder", "clip"))
        sign = self.relevance_sign if self.relevance_sign is not None else SIGNS[self.relevance]
        if isinstance(sign, bool) or sign not in (1, -1):
            raise InvalidOption("CDPruner", "relevance_sign", f"has to be 1 or -1, got {sign!r}")
        object.__setattr__(self, "relevance_sign", sign)
        if self.relevance == "clip":
            object.__setattr__(self, "needs", frozenset({CLIP_EMBEDDINGS, CLIP_TEXT}))

    def prepare(self, tokens: VisualTokens, context: ReduceContext) -> Mapping[str, Tensor]:
        is_clip = self.relevance == "clip"
        compared = context.aux_features[CLIP_EMBEDDINGS].mT if is_clip else tokens.embeddings
        text = context.clip_text if is_clip else context.text_embeddings
        if text is None:
            raise ValueError("CDPruner was given no text to compare with")
        unit = unit_rows(compared)
        if not text.shape[0]:
            return {"relevance": unit.new_ones(tokens.num_tokens)}
        cosines = unit @ unit_rows(text.to(unit.device)).mean(dim=0)
        return {"relevance": relevance((self.relevance_sign or 1) * cosines)}

    def pick(self, step: Step, k: int) -> Tensor:
        return pick_order(step.embeddings, step.aux_features["relevance"], k)[0]


def relevance(scores: Tensor) -> Tensor:
    """`scores` (N,) brought to (0, 1]; all 1 where they are equal."""
    low, high = scores.aminmax()
    spread = high - low
    return torch.where(spread > 0, (scores - low + 1e-6) / spread.clamp_min(1e-12), torch.ones_like(scores)).clamp_max(
        1
    )


@torch.no_grad()
def pick_order(embeddings: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(k,) int64 and (k,) float32: the chosen of `embeddings` (N, D) in the order they are chosen, and their gains.

    The lowest index wins a tie.

    Args:
        weights: (N,) relevance of each, in [0, 1].
    """
    unit = unit_rows(embeddings)
    similarity = unit @ unit.T
    residual = similarity.diagonal().round()  # 1, or 0 for a row without length: rounding must not break ties
    factors = similarity.new_zeros(k, similarity.shape[0])
    chosen = torch.empty(k, dtype=torch.int64, device=unit.device)
    gains, is_chosen = similarity.new_empty(k), torch.zeros_like(residual)
    for step in range(k):
        # With nothing left of the residual, relevance decides: below every true gain, above the chosen.
        gain = torch.where(residual > EXHAUSTED, weights.square() * residual, weights - 2) + is_chosen
        torch.max(gain, dim=0, out=(gains[step], chosen[step]))
        latest = chosen[step : step + 1]
        known, left = factors[:step].index_select(1, latest).squeeze(1), residual.index_select(0, latest)
        update = (similarity.index_select(0, latest).squeeze(0) - known @ factors[:step]) / left.clamp_min(
            EXHAUSTED
        ).sqrt()
        factors[step] = torch.where(left > EXHAUSTED, update, 0.0)
        residual = residual - factors[step].square()
        is_chosen.index_fill_(0, latest, -math.inf)
    return chosen, gains
