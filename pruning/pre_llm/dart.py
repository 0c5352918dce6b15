"""DART: from a few pivots, keep what duplicates them least.

Paper     "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025,
          arXiv:2502.11494 (training-free). Its form on embeddings, before the decoder, as TensorRT-Edge-LLM ships it.
Stage     pre_llm, after the projector; within each crop or frame; depends on the question where there are text pivots.
Needs     text_embeddings: the question as the decoder embeds it.
Cost      O(N D) per pivot.
Equation  pivots are the `image_pivots` tokens and the `text_pivots` tokens of the question with the largest L1 norm. In
          order of place, those of the picture first, each takes the tokens not yet taken with the lowest cosine to it:
          floor((k - image pivots) / pivots) each, the first pivots one more. Kept are the image pivots and what was
          taken.
Positions authors: kept; here kept.
Differs   from the authors' code, which takes keys of the decoder's second layer for the norms and normed hidden states
          for the cosines, at the input of its third: here both are the embeddings, so that the decoder never sees what
          is dropped. Theirs keeps image pivots + pivots floor(k / pivots) tokens, here exactly k, and goes through the
          pivots in the order of a Python set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import VisualTokens
from mm.plugins.features import TEXT_EMBEDDINGS
from mm.plugins.reducer import ReduceContext
from pruning.base import int_option, top_k_ascending, unit_rows
from pruning.helpers.steps import Step, StepReducer

TEXT_COSINES = "text_cosines"
BROKEN = 1e30
"""Above every cosine, and below the infinity of a token that is taken."""


@dataclass(frozen=True, kw_only=True)
class DART(StepReducer):
    """From a few pivots, keep what duplicates them least (DART).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        image_pivots: Pivots among the tokens of each crop or frame; at least 1.
        text_pivots: Pivots among the question's tokens; 0 leaves the question out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({TEXT_EMBEDDINGS})
    query_aware: ClassVar[bool] = True
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        int_option("dart", "image_pivots", self.image_pivots, 1, 1_000_000)
        int_option("dart", "text_pivots", self.text_pivots, 0, 1_000_000)

    def prepare(self, tokens: VisualTokens, context: ReduceContext) -> Mapping[str, Tensor]:
        text = context.text_embeddings
        if text is None:
            raise ValueError("DART was given no text_embeddings")
        unit = unit_rows(tokens.embeddings)
        text = text.to(unit.device).float()
        pivots = top_k_ascending(text.abs().sum(dim=1), self.text_pivots)
        return {TEXT_COSINES: unit_rows(text[pivots]) @ unit.T}

    def pick(self, step: Step, k: int) -> Tensor:
        norms = step.embeddings.float().abs().sum(dim=1)
        pivots = top_k_ascending(norms, min(self.image_pivots, k))
        unit, is_broken = unit_rows(step.embeddings), ~torch.isfinite(norms)
        cosines = torch.cat([unit[pivots] @ unit.T, step.aux_features[TEXT_COSINES]])
        cosines = cosines.masked_fill(is_broken, BROKEN)
        taken = torch.zeros_like(norms).index_fill_(0, pivots, math.inf)
        kept = [pivots]
        share, extra = divmod(k - len(pivots), len(cosines))
        for i, row in enumerate(cosines):
            latest = torch.sort(row + taken, stable=True).indices[: share + (i < extra)]
            taken.index_fill_(0, latest, math.inf)
            kept.append(latest)
        return torch.cat(kept)
