"""The layer of a trained drafter with its own KV cache of one layer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import to_tensor
from mm.engine.attention.base import build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.spec_decode.cost_model import MAX_WARM_TOKENS, warm_up
from mm.engine.spec_decode.drafters.eagle.head import DraftHead, rotary
from mm.models.attention import AttentionMetadata
from mm.models.kv_cache_spec import KVCacheSpec


class DraftLayer:
    """Runs tokens of several sequences through the layer.

    Args:
        num_bytes: Size of the KV cache.
        max_num_seqs: Number of sequences at a time.
    """

    def __init__(
        self, network: DraftHead, dtype: torch.dtype, device: torch.device, num_bytes: int, max_num_seqs: int
    ) -> None:
        config = network.config
        shape = KVCacheSpec(
            num_layers=1, num_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype, device=device
        )
        self.network = network
        self.cache = KVCache(shape, num_blocks=max(1, num_bytes // shape.block_bytes), max_num_seqs=max_num_seqs)
        self._attention = build_attention(self.cache)
        self._table = rotary(torch.arange(1024, device=device), config.head_dim, config.rope_theta)

    def run(
        self,
        inputs: Tensor,
        positions: Tensor,
        seq_indices: Sequence[int],
        counts: Sequence[int],
        wanted: Tensor,
        masks: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Append tokens, for which `append_slots` was called, and return the layer's output (w, D) for some of them.

        Args:
            inputs: (T, D), sequence after sequence.
            positions: (T,) int64.
            seq_indices, counts: The sequences, and the number of tokens of each.
            wanted: (w,) int64, indices of the tokens whose output is returned.
            masks: As in `AttentionMetadata`.
        """
        metadata = AttentionMetadata.of(seq_indices, counts, masks)
        attended = self._attention.attend(0, self.network.project(inputs), metadata, self._rotary(positions))
        if wanted.shape[0] != inputs.shape[0]:
            inputs, attended = inputs[wanted], attended[wanted]
        return self.network.finish(inputs, attended.flatten(1))

    @torch.inference_mode()
    def warm(self) -> None:
        """Run steps of each number of tokens: the first step of a number is slow, as it is for the target."""
        network, shape, seq_index = self.network, self.cache.shape, self.cache.allocate()

        def run(count: int) -> float:
            start = time.perf_counter()
            self.append_slots(seq_index, count)
            every = torch.arange(count, device=shape.device)
            states = torch.zeros(count, network.config.feature_width, dtype=shape.dtype, device=shape.device)
            inputs = network.inputs(network.features(states), torch.zeros_like(every))
            network.next_states(self.run(inputs, every, [seq_index], [count], every))
            self.truncate(seq_index, 0)
            return time.perf_counter() - start

        warm_up(run, min(MAX_WARM_TOKENS, self.cache.num_free_blocks * shape.block_size))
        self.cache.free(seq_index)

    def append_slots(self, seq_index: int, num_tokens: int) -> None:
        """Make room for new tokens; see `KVCache.append_slots`."""
        self.cache.append_slots(seq_index, num_tokens)

    def length(self, seq_index: int) -> int:
        """Number of tokens that the cache holds of a sequence."""
        return int(self.cache.lengths[0, seq_index])

    def truncate(self, seq_index: int, length: int) -> None:
        """Keep only the first `length` tokens."""
        self.cache.truncate(seq_index, 0, length)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        most = int(positions.max()) + 1
        if most > self._table[0].shape[0]:
            config = self.network.config
            size = 1 << (most - 1).bit_length()
            self._table = rotary(torch.arange(size, device=positions.device), config.head_dim, config.rope_theta)
        return self._table[0][positions], self._table[1][positions]


def last_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64: the index of the last token of each of several consecutive chunks."""
    return to_tensor(np.cumsum(counts) - 1, device)
