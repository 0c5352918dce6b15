"""Uniform: keep tokens at even distances in reading order. A baseline every method has to beat.

Stage     pre_llm, after the projector.
Cost      O(k); looks at no value.
Equation  i_m = floor((2m + 1) N / (2k)), m = 0..k-1: the middle of each of k equal runs, in integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.tokens import VisualTokens
from mm.plugins.reducer import ReduceContext
from pruning.base import BudgetReducer


@dataclass(frozen=True, kw_only=True)
class Uniform(BudgetReducer):
    """Keep tokens at even distances in reading order."""

    def select(self, tokens: VisualTokens, context: ReduceContext, k: int) -> Tensor:
        middles = 2 * torch.arange(k, device=tokens.embeddings.device) + 1
        return middles * tokens.num_tokens // (2 * k)
