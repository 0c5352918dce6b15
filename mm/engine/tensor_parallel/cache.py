"""The KV cache of rank 0, which the other members' caches follow call by call.

Each member's cache holds the keys and values of its own heads, and all of them have the same blocks, tables and
lengths. A call is repeated only after it succeeded here, so it succeeds everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from mm.data.arrays import IntArray
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.tensor_parallel.gang import Gang
from mm.models.kv_cache_spec import KVCacheSpec

T = TypeVar("T")


class LeadingCache(KVCache):
    """A `KVCache` that tells the gang what changes it.

    Args:
        shape, num_blocks, max_num_seqs: As for `KVCache`. The heads are those of one member.
        gang: The members.
    """

    has_all_heads = False

    def __init__(self, shape: KVCacheSpec, *, num_blocks: int, max_num_seqs: int, gang: Gang) -> None:
        super().__init__(shape, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
        self._gang, self._is_inside = gang, False
        gang.make_cache(shape, num_blocks, max_num_seqs)

    def _noted(self, method: Callable[..., T], *arguments: object) -> T:
        """Call a method of the plain cache. What it calls itself is part of it."""
        if self._is_inside:
            return method(*arguments)
        given: list[Any] = [one.copy() if isinstance(one, np.ndarray) else one for one in arguments]  # as they are now
        self._is_inside = True
        try:
            result = method(*arguments)
        finally:
            self._is_inside = False
        self._gang.note(method.__name__, given)
        return result

    def allocate(self) -> int:
        return self._noted(super().allocate)

    def free(self, seq_index: int) -> None:
        self._noted(super().free, seq_index)

    def append_slots(self, seq_index: int, num_tokens: int | IntArray, start: int = 0, stop: int | None = None) -> None:
        self._noted(super().append_slots, seq_index, num_tokens, start, stop)

    def append_slot_each(self, seq_indices: IntArray) -> None:
        self._noted(super().append_slot_each, seq_indices)

    def remove_skipped_blocks(self, seq_indices: IntArray) -> None:
        if self.windows and len(seq_indices):
            self._noted(super().remove_skipped_blocks, seq_indices)

    def truncate(self, seq_index: int, layer: int, length: int) -> None:
        self._noted(super().truncate, seq_index, layer, length)

    def keep_tokens(self, seq_index: int, layer: int, tokens: Tensor) -> None:
        self._noted(super().keep_tokens, seq_index, layer, tokens)

    def keep_accepted(
        self, seq_index: int, count: int, path: Sequence[int], start: int = 0, stop: int | None = None
    ) -> None:
        self._noted(super().keep_accepted, seq_index, count, list(path), start, stop)

    def fork(self, seq_index: int) -> int:
        return self._noted(super().fork, seq_index)

    def share(self, seq_index: int, ids: IntArray) -> None:
        self._noted(super().share, seq_index, ids)

    def add_reference(self, ids: IntArray) -> None:
        self._noted(super().add_reference, ids)

    def drop_reference(self, ids: IntArray) -> None:
        self._noted(super().drop_reference, ids)

    def read(self, layer: int, seq_index: int) -> tuple[Tensor, Tensor]:
        return self._gang.read_cache(self, layer, seq_index)
