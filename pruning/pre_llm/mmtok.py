"""MMTok: keep tokens that cover the question and the picture at once.

Paper     "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv:2508.18264
          (training-free).
Stage     pre_llm, after the projector; within each crop or frame; depends on the question.
Needs     tower_features, what the tower saw before the projector; text_embeddings, the question as the decoder embeds
          it.
Cost      O(N^2 d) for the similarities, O(k N (N + T)) elementwise for the selection.
Equation  M = softmax_j(cos(text_t, x_j) / text_temperature) / T and S = alpha softmax_j(cos(z_i, z_j) /
          picture_temperature) / N, rows over the N tokens; v = 0; k times: argmax over the tokens not yet chosen of
          sum_r max(0, C_rj - v_r) with C = [M; S], then v = max(v, C_.j). Without a question S alone.
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code: all of the question's tokens are covered, where theirs drops stop words first and can
          let an agent write a caption; each crop has its share of the budget. Tokens of padding are not told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions, VisualTokens
from mm.plugins.features import TEXT_EMBEDDINGS, TOWER_FEATURES
from mm.plugins.reducer import ReduceContext
from pruning.base import number_option, unit_rows
from pruning.helpers.coverage import most_covering
from pruning.helpers.steps import Step, StepReducer

TEXT_COSINES = "text_cosines"


@dataclass(frozen=True, kw_only=True)
class MMTok(StepReducer):
    """Keep tokens that cover the question and the picture at once (MMTok).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        alpha: How much covering the picture counts against covering the question, 0 to 1000.
        text_temperature: Of the softmax over cosines with the question, 0.001 to 100; low lets each word count for few
            tokens.
        picture_temperature: Of the softmax over cosines between tokens, 0.001 to 100.
    """

    needs: ClassVar[frozenset[str]] = frozenset({TOWER_FEATURES, TEXT_EMBEDDINGS})
    query_aware: ClassVar[bool] = True
    published_positions: ClassVar[PublishedPositions] = "compact"
    alpha: float = 0.5
    text_temperature: float = 0.02
    picture_temperature: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, low, high in (
            ("alpha", 0, 1000),
            ("text_temperature", 0.001, 100),
            ("picture_temperature", 0.001, 100),
        ):
            object.__setattr__(self, option, number_option("mmtok", option, getattr(self, option), low, high))

    def prepare(self, tokens: VisualTokens, context: ReduceContext) -> Mapping[str, Tensor]:
        text = context.text_embeddings
        if text is None:
            raise ValueError("MMTok was given no text_embeddings")
        unit = unit_rows(tokens.embeddings)
        return {
            TOWER_FEATURES: context.aux_features[TOWER_FEATURES],
            TEXT_COSINES: unit_rows(text.to(unit.device)) @ unit.T,
        }

    def pick(self, step: Step, k: int) -> Tensor:
        unit = unit_rows(step.aux_features[TOWER_FEATURES].T)
        to_text = torch.softmax(step.aux_features[TEXT_COSINES] / self.text_temperature, dim=1)
        to_picture = torch.softmax(unit @ unit.T / self.picture_temperature, dim=1)
        rows = [to_text / max(1, len(to_text)), to_picture * (self.alpha / len(to_picture))]
        usable = torch.isfinite(step.embeddings).all(dim=1)
        return most_covering(torch.cat(rows), torch.where(usable, 0.0, -math.inf), k)[0]
