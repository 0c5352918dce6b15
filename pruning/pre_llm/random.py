"""Random: keep tokens drawn by a seeded hash of their index. A baseline every method has to beat.

Stage     pre_llm, after the projector.
Cost      O(N log N) on N integers; looks at no value.
Equation  keep the k largest h(index, seed), where h is the splitmix64 finaliser: no generator state, so the same tokens
          are kept on every device, for every batch and in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.tokens import VisualTokens
from mm.plugins.reducer import ReduceContext
from pruning.base import BudgetReducer, int_option

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Random(BudgetReducer):
    """Keep tokens drawn at random, the same ones for the same seed.

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        seed: From 0 to 2**63 - 1.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        int_option("Random", "seed", self.seed, 0, MAX_SEED)

    def select(self, tokens: VisualTokens, context: ReduceContext, k: int) -> Tensor:
        hashes = index_hash(tokens.num_tokens, self.seed, tokens.embeddings.device)
        # Not top_k_ascending: it compares in float32, which would merge neighbouring 64-bit hashes into ties.
        return torch.sort(hashes, descending=True, stable=True).indices[:k].sort().values


def index_hash(num_tokens: int, seed: int, device: torch.device) -> Tensor:
    """(num_tokens,) int64: splitmix64 (Steele, Lea and Flood 2014) of the indices, starting from `seed`.

    int64 products wrap like unsigned ones; only the right shifts need their sign bits cleared.
    """
    start = _mix_python(seed)
    state = torch.arange(1, num_tokens + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    return state ^ _shift_right(state, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix_python(value: int) -> int:
    """The same finaliser on one Python integer: else neighbouring seeds would give shifted copies of one sequence."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return _signed(value ^ (value >> 31))
