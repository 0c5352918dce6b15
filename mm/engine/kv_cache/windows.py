"""Sliding windows: which blocks of a sequence no later token attends to, so that they can be freed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mm.data.arrays import IntArray
from mm.models.kv_cache_spec import KVCacheSpec

NULL_BLOCK = 0
"""The block that stands in a block table for one that was freed, so that tables, lengths and slots keep their meaning.

It holds zeros. Where there are windows it is never allocated.
"""

NULL_REFERENCES = 1 << 30
"""Its reference count."""


class Windows:
    """The layers with a sliding window, and how many of each sequence's first blocks were freed there.

    Attributes:
        layers, sizes: (m,) int64: the layers, and how many tokens one attends to there, itself included.
        num_reserved: Blocks that are never allocated: `NULL_BLOCK`, where there are windows.
    """

    def __init__(self, shape: KVCacheSpec, max_num_seqs: int) -> None:
        found = [(layer, size) for layer, size in enumerate(shape.windows) if size is not None]
        self.layers = np.array([layer for layer, _ in found], dtype=np.int64)
        self.sizes = np.array([size for _, size in found], dtype=np.int64)
        self.num_reserved = int(bool(found))
        self._block_size = shape.block_size
        self._num_skipped = np.zeros((len(found), max_num_seqs), dtype=np.int64)

    def __bool__(self) -> bool:
        return bool(self.num_reserved)

    def begin(self, seq_index: int, like: int | None = None) -> None:
        """A new sequence, or a copy of another one."""
        self._num_skipped[:, seq_index] = 0 if like is None else self._num_skipped[:, like]

    def first_visible(self, lengths: IntArray) -> IntArray:
        """(m, ...) the first block that the token after `lengths` (m, ...) tokens attends to."""
        sizes = self.sizes.reshape(-1, *(1,) * (lengths.ndim - 1))
        return np.maximum(lengths + 1 - sizes, 0) // self._block_size

    def skipped(self, lengths: IntArray, seq_indices: IntArray) -> Iterator[tuple[int, int, int, int]]:
        """(layer, sequence, first block, end) of the blocks that can be freed now, and are then taken as freed.

        Args:
            lengths: (m, n) tokens that the layers hold for the sequences.
        """
        first, released = self.first_visible(lengths), self._num_skipped[:, seq_indices]
        for i, j in np.argwhere(first > released).tolist():
            yield int(self.layers[i]), int(seq_indices[j]), int(released[i, j]), int(first[i, j])
            self._num_skipped[i, seq_indices[j]] = first[i, j]
