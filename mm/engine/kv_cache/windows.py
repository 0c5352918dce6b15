"""Blocks that layers with a window give back, because no later token sees them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mm.data.arrays import IntArray
from mm.models.kv_cache_spec import KVCacheSpec

NOTHING = 0
"""The block that entries of tables name instead of one that was given back. It is never allocated where there are
windows, and holds zeros: tables, lengths and slots stay what they are."""

ALWAYS = 1 << 30
"""References of that block."""


class Windows:
    """Which layers have a window, and how many of its first blocks each sequence has given back there.

    Attributes:
        layers, sizes: (m,) int64: the layers, and how many tokens one sees there, itself included.
        num_reserved: Blocks that are never allocated: `NOTHING`, where there are windows.
    """

    def __init__(self, shape: KVCacheSpec, max_num_seqs: int) -> None:
        found = [(layer, size) for layer, size in enumerate(shape.windows) if size is not None]
        self.layers = np.array([layer for layer, _ in found], dtype=np.int64)
        self.sizes = np.array([size for _, size in found], dtype=np.int64)
        self.num_reserved = int(bool(found))
        self._block_size = shape.block_size
        self._num_released = np.zeros((len(found), max_num_seqs), dtype=np.int64)

    def __bool__(self) -> bool:
        return bool(self.num_reserved)

    def begin(self, seq_index: int, like: int | None = None) -> None:
        """A sequence that has given back nothing, or as much as another one."""
        self._num_released[:, seq_index] = 0 if like is None else self._num_released[:, like]

    def first_seen(self, lengths: IntArray) -> IntArray:
        """(m, ...) the first block that a token behind `lengths` (m, ...) tokens sees."""
        sizes = self.sizes.reshape(-1, *(1,) * (lengths.ndim - 1))
        return np.maximum(lengths + 1 - sizes, 0) // self._block_size

    def unseen(self, lengths: IntArray, seq_indices: IntArray) -> Iterator[tuple[int, int, int, int]]:
        """(layer, sequence, first block, end) of what is to be given back now.

        Args:
            lengths: (m, n) tokens that the layers hold for the sequences.
        """
        first, released = self.first_seen(lengths), self._num_released[:, seq_indices]
        for i, j in np.argwhere(first > released).tolist():
            yield int(self.layers[i]), int(seq_indices[j]), int(released[i, j]), int(first[i, j])
            self._num_released[i, seq_indices[j]] = first[i, j]
