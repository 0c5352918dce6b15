"""The size of one token in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one token of a model takes in the KV cache.

    Attributes:
        num_layers: Layers that have keys and values.
        num_heads: Key/value heads.
        head_dim: Width of one head.
        block_size: Tokens of a block.
        has_states: Whether other layers keep a state of each sequence.
        windows: Per layer, how many tokens one sees, itself included; None where it sees all earlier ones. Empty where
            every layer does.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 16
    has_states: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens in one layer."""
        return -(-num_tokens // self.block_size)
