"""The noise of sampling: a function of (seed, choice, position, token id) and of nothing else.

It is counter-based: each token's number is computed from its key alone (SplitMix64), in integers that every device
computes alike. A text therefore does not depend on the batch, the device, preemption or speculative decoding. Where
only a few tokens are left, only their noise is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit numbers.
_STEP = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def noise_key(seed: int, choice: int, position: int) -> int:
    """The key of one generated token."""
    digest = hashlib.blake2b(f"{seed}:{choice}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64 of the broadcast shape of `keys` and `token_ids` (both int64).

    Between -3.6 and 36.8: uniform numbers of 52 bits, never 0 or 1.
    """
    return _uniform(keys, token_ids).log_().neg_().log_().neg_()


def _uniform(keys: Tensor, numbers: Tensor) -> Tensor:
    """Uniform numbers between 0 and 1, neither of them included; float64 of the broadcast shape of the two int64."""
    z = (numbers + 1) * _STEP + keys
    z = _mixed(z, 30).mul_(_MIX_1)
    z = _mixed(z, 27).mul_(_MIX_2)
    z = _mixed(z, 31).bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1)
    return z.double().add_(0.5).mul_(2.0**-52)


def _mixed(z: Tensor, shift: int) -> Tensor:
    """z ^ (z >>> shift), in place; torch shifts signed numbers arithmetically, so the sign's copies are masked."""
    return z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def keys_of(triples: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(B, 1) keys of (seed, choice, position) triples."""
    return torch.tensor([noise_key(*triple) for triple in triples], device=device).unsqueeze(1)
