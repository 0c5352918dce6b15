"""The next token from logits.

Sampling is by Gumbel noise: argmax(log p + g), where g is a function of (seed, choice, position) alone. So an answer
depends on its seed and not on what else runs, on the batch, or on whether a drafter guessed ahead.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One choice's rule, with every default filled in.

    Attributes:
        temperature: 0 is greedy.
        top_p: Smallest set of tokens whose probabilities reach this mass.
        seed: Key of the noise.
        choice: Index of the answer among the request's n.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0

    def choose(self, logits: Tensor, position: int) -> int:
        """The token at `position` (of the generated text) for logits (vocab,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        law = torch.log_softmax(logits.float().cpu() / self.temperature, dim=-1)
        if self.top_p < 1:
            law = law.masked_fill(~_nucleus(law.exp(), self.top_p), -torch.inf)
        return int((law + self._gumbel(position, law.shape[0])).argmax())

    def _gumbel(self, position: int, vocab: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed}:{self.choice}:{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
        uniform = torch.rand(vocab, generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(vocab,) bool: the most probable tokens, up to and including the one that reaches `top_p`."""
    ordered, order = probs.sort(descending=True, stable=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(inside).scatter(0, order, inside)


def new_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)
