"""Blocks that a later prompt may begin with: the second question about a picture does not prefill it again.

A block is named by everything its rows depend on: the blocks before it, token ids, positions and, for visual rows, the
content of their item as encoder and reducer left it. Only whole blocks are shared. An entry holds one block per layer;
it costs nothing that could be used otherwise, since the scheduler takes entries nobody uses, oldest first, when it
needs room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm.engine.kv_cache.blocks import KVCache

Name = bytes


@dataclass(frozen=True, kw_only=True)
class BlockHasher:
    """What the rows of a sequence depend on, as far as they may be shared.

    Attributes:
        token_ids: (n,) int64; visual rows hold the placeholder.
        positions: (P, n) int64.
        items: Keys of the visual items, in order.
        item_of_row: (n,) int64, which item a visual row belongs to, -1 for text.
        salt: Sequences with different salts never share.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    items: Sequence[str]
    item_of_row: np.ndarray
    salt: str = ""

    def names(self, block_size: int) -> list[Name]:
        """One per whole block; each contains those before it."""
        name = hashlib.blake2b(f"salt:{self.salt}".encode(), digest_size=16).digest()
        names = []
        for start in range(0, len(self.token_ids) - block_size + 1, block_size):
            rows = slice(start, start + block_size)
            digest = hashlib.blake2b(name, digest_size=16)
            digest.update(self.token_ids[rows].tobytes())
            digest.update(np.ascontiguousarray(self.positions[:, rows]).tobytes())
            for item in np.unique(self.item_of_row[rows]).tolist():
                if item >= 0:
                    digest.update(f"|{self.items[item]}".encode())
            name = digest.digest()
            names.append(name)
        return names


class PrefixCache:
    """Entries over one `KVCache`, least recently used first.

    Args:
        enabled: False finds and stores nothing.
    """

    def __init__(self, cache: KVCache, *, enabled: bool = True) -> None:
        self._cache, self._enabled = cache, enabled
        self._entries: OrderedDict[Name, np.ndarray] = OrderedDict()
        self._is_held = np.zeros(cache.num_blocks, dtype=bool)
        self.num_queries = 0
        self.num_hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries, whether or not a sequence uses them too."""
        return len(self._entries) * self._cache.shape.num_layers * self._cache.shape.block_bytes

    @property
    def num_idle_bytes(self) -> int:
        """Bytes of the blocks that nothing but an entry holds. May be read by any thread."""
        return self._num_idle * self._cache.shape.block_bytes

    @property
    def _num_idle(self) -> int:
        return int((self._is_held & (self._cache.references == 1)).sum())

    def match(self, names: Sequence[Name]) -> np.ndarray:
        """(num_layers, n) block ids of the longest known beginning. They stay only while something retains them."""
        found = []
        for name in names:
            if name not in self._entries:
                break
            found.append(self._entries[name])
        # From the end, so that a block is never older than those that are found through it.
        for name in reversed(names[: len(found)]):
            self._entries.move_to_end(name)
        return np.stack(found, axis=1) if found else np.zeros((self._cache.shape.num_layers, 0), dtype=np.int32)

    def count(self, num_rows: int, num_found: int) -> None:
        """Count a prompt's rows and those of them that were found."""
        self.num_queries += num_rows
        self.num_hits += num_found

    def put(self, slot: int, names: Sequence[Name]) -> None:
        """Remember a slot's first blocks, as many as there are names, in every layer."""
        if not self._enabled:
            return
        for i in range(len(names) - 1, -1, -1):
            if names[i] in self._entries:
                self._entries.move_to_end(names[i])
                continue
            ids = self._cache.block_tables[:, slot, i].copy()
            self._cache.add_reference(ids)
            self._entries[names[i]] = ids
            self._is_held[ids] = True

    def make_room(self, num_blocks: int) -> bool:
        """Drop entries that only this cache holds until so many blocks are free; whether that came about."""
        if self._cache.num_free_blocks >= num_blocks:
            return True
        if self._cache.num_free_blocks + self._num_idle < num_blocks:
            return False  # nothing is forgotten in vain
        for name in list(self._entries):
            ids = self._entries[name]
            if (self._cache.num_references(ids) == 1).all():
                self._release(ids)
                del self._entries[name]
                if self._cache.num_free_blocks >= num_blocks:
                    return True
        return False

    def clear(self) -> None:
        for ids in self._entries.values():
            self._release(ids)
        self._entries.clear()

    def _release(self, ids: np.ndarray) -> None:
        self._is_held[ids] = False
        self._cache.drop_reference(ids)

    @property
    def held(self) -> np.ndarray:
        """Every block id held, for `KVCache.check`."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *self._entries.values()])
