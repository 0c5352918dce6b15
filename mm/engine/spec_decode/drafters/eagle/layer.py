"""A trained drafter's layer over a cache of its own: keys and values of one layer, a slot per answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm.engine.attention.base import build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.spec_decode.cost_model import MOST_WARM, warm_up
from mm.engine.spec_decode.drafters.eagle.head import DraftHead, rotary
from mm.models.attention import AttentionMetadata
from mm.models.kv_cache_spec import KVCacheSpec


class DraftLayer:
    """Runs rows of several answers through the layer.

    Args:
        num_bytes: Size of the cache.
        num_slots: Answers at a time.
    """

    def __init__(self, network: DraftHead, dtype: torch.dtype, device: torch.device, num_bytes: int, num_slots: int):
        config = network.config
        shape = KVCacheSpec(
            num_layers=1, num_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype, device=device
        )
        self.network = network
        self.cache = KVCache(shape, num_blocks=max(1, num_bytes // shape.block_bytes), max_num_seqs=num_slots)
        self._attention = build_attention(self.cache)
        self._table = rotary(torch.arange(1024, device=device), config.head_dim, config.rope_theta)

    def run(
        self,
        inputs: Tensor,
        positions: Tensor,
        slots: Sequence[int],
        counts: Sequence[int],
        wanted: Tensor,
        masks: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Append rows to the cache, whose room was made by `grow`, and give the layer's output (w, D) of some.

        Args:
            inputs: (R, D), slot after slot.
            positions: (R,) int64.
            counts: Rows of each slot.
            wanted: (w,) int64, rows whose output is asked for.
            masks: As in `AttentionMetadata`.
        """
        rows = self.network.project(inputs)
        seen = self._attention.attend(0, rows, AttentionMetadata.of(slots, counts, masks), self._rotary(positions))
        if wanted.shape[0] != inputs.shape[0]:
            inputs, seen = inputs[wanted], seen[wanted]
        return self.network.finish(inputs, seen.flatten(1))

    @torch.inference_mode()
    def warm(self) -> None:
        """Run rows that mean nothing, of each number in turn: the first run of a number is slow, as of the target's."""
        network, shape, slot = self.network, self.cache.shape, self.cache.allocate()

        def run(count: int) -> float:
            start = time.perf_counter()
            self.grow(slot, count)
            every = torch.arange(count, device=shape.device)
            states = torch.zeros(count, network.config.feature_width, dtype=shape.dtype, device=shape.device)
            inputs = network.inputs(network.features(states), torch.zeros_like(every))
            network.guesses(self.run(inputs, every, [slot], [count], every))
            self.shrink(slot, 0)
            return time.perf_counter() - start

        warm_up(run, min(MOST_WARM, self.cache.num_free_blocks * shape.block_size))
        self.cache.free(slot)

    def grow(self, slot: int, num_rows: int) -> None:
        self.cache.append_slots(slot, num_rows)

    def length(self, slot: int) -> int:
        return int(self.cache.lengths[0, slot])

    def shrink(self, slot: int, length: int) -> None:
        """Forget what lies behind the first `length` rows."""
        self.cache.truncate(slot, 0, length)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        most = int(positions.max()) + 1
        if most > self._table[0].shape[0]:
            config = self.network.config
            size = 1 << (most - 1).bit_length()
            self._table = rotary(torch.arange(size, device=positions.device), config.head_dim, config.rope_theta)
        return self._table[0][positions], self._table[1][positions]


def last_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64: the last row of each of several chunks that lie one behind the other."""
    return torch.from_numpy(np.cumsum(counts) - 1).to(device)
