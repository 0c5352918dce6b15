"""Automatic prefix caching: a prompt begins with the blocks that earlier prompts left in the cache.

A block hash covers everything that the block's keys and values depend on: the hash of the block before it, token ids,
positions, and for visual tokens the content of their item after encoder and reducer. Only full blocks are shared. An
entry references one block per layer. Layers that keep a state have no blocks: there a prompt can begin only with blocks
behind which a snapshot of the states was kept. Entries take only memory that nothing else needs: the scheduler evicts
unused entries, least recently used first, when blocks run short.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm.data.arrays import BoolArray, IntArray
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.states import Snapshot, Snapshots
from mm.engine.kv_cache.windows import NULL_BLOCK
from mm.models.recurrent import LayerState

BlockHash = bytes
"""16 bytes that stand for a full block and every block before it."""


@dataclass(frozen=True, kw_only=True)
class BlockHasher:
    """What the keys and values of a sequence depend on, as far as blocks may be shared.

    Attributes:
        token_ids: (n,) int64. Visual tokens hold the placeholder.
        positions: (P, n) int64.
        items: Keys of the visual items, in order.
        item_of_token: (n,) int64, the item that a visual token belongs to, and -1 for text.
        salt: Sequences with different salts never share.
        decoder: Names the weights of the decoder's layers, where they are not the model's own.
    """

    token_ids: IntArray
    positions: IntArray
    items: Sequence[str]
    item_of_token: IntArray
    salt: str = ""
    decoder: str = ""

    def block_hashes(self, block_size: int) -> list[BlockHash]:
        """One hash per full block, in order. Each covers the blocks before it too."""
        block_hash = hashlib.blake2b(f"decoder:{self.decoder}|salt:{self.salt}".encode(), digest_size=16).digest()
        hashes: list[BlockHash] = []
        for start in range(0, len(self.token_ids) - block_size + 1, block_size):
            tokens = slice(start, start + block_size)
            digest = hashlib.blake2b(block_hash, digest_size=16)
            digest.update(self.token_ids[tokens].tobytes())
            digest.update(np.ascontiguousarray(self.positions[:, tokens]).tobytes())
            for item in np.unique(self.item_of_token[tokens]).tolist():
                if item >= 0:
                    digest.update(f"|{self.items[item]}".encode())
            block_hash = digest.digest()
            hashes.append(block_hash)
        return hashes


MAX_NAMES = 256
"""How many beginnings of prompts are published at most."""


class PrefixCache:
    """Block hashes to blocks of one `KVCache`, least recently used first.

    Args:
        enabled: False finds and stores nothing.
        snapshot_bytes: Memory of the snapshots of states.

    Attributes:
        enabled: Whether anything is found or stored.
        num_queries, num_hits: Prompt tokens that were looked up, and those of them that were found.
    """

    def __init__(self, cache: KVCache, *, enabled: bool = True, snapshot_bytes: int = 1 << 28) -> None:
        self._cache, self.enabled = cache, enabled
        self._snapshots = Snapshots(snapshot_bytes) if cache.shape.has_states else None
        self._entries: OrderedDict[BlockHash, IntArray] = OrderedDict()
        self._names = dict[str, tuple[BlockHash, int]]()
        self._is_held = np.zeros(len(cache.references), dtype=bool)
        self.num_queries = 0
        self.num_hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries, whether or not a sequence uses them too."""
        return int(self._is_held.sum()) * self._cache.shape.block_bytes

    @property
    def num_idle_bytes(self) -> int:
        """Bytes of the blocks that only an entry references. Any thread may read this."""
        return self._num_idle * self._cache.shape.block_bytes

    @property
    def _num_idle(self) -> int:
        return int((self._is_held & (self._cache.references == 1)).sum())

    def match(self, hashes: Sequence[BlockHash]) -> IntArray:
        """(num_layers, n) block ids of the longest cached prefix. They stay valid only while something references them.

        Args:
            hashes: Block hashes of the prompt, in order.
        """
        found: list[IntArray] = []
        for block_hash in hashes:
            if block_hash not in self._entries:
                break
            found.append(self._entries[block_hash])
        usable = self._usable_lengths(found)
        while found and not (
            usable[len(found)] and (self._snapshots is None or hashes[len(found) - 1] in self._snapshots)
        ):
            found.pop()
        # From the end, so that a block is never older than those that are found through it.
        for block_hash in reversed(hashes[: len(found)]):
            self._entries.move_to_end(block_hash)
        return np.stack(found, axis=1) if found else np.zeros((self._cache.shape.num_layers, 0), dtype=np.int32)

    def _usable_lengths(self, found: Sequence[IntArray]) -> BoolArray:
        """(n + 1,) whether a prompt can go on after 0 to n of these entries: no freed block is in a window then."""
        usable, windows = np.ones(len(found) + 1, dtype=bool), self._cache.windows
        if found and windows:
            is_null = np.stack(found, axis=1)[windows.layers] == NULL_BLOCK
            last_null = np.maximum.accumulate(np.where(is_null, np.arange(len(found)), -1), axis=1)
            counts = np.arange(1, len(found) + 1) * self._cache.shape.block_size
            first = windows.first_visible(np.broadcast_to(counts, is_null.shape))
            usable[1:] = (last_null < first).all(axis=0)
        return usable

    def begin(self, seq_index: int, hashes: Sequence[BlockHash]) -> None:
        """Give a sequence, whose first blocks were found by these hashes, the states behind them."""
        if self._snapshots is not None and hashes:
            self._cache.states.restore(seq_index, self._snapshots.get(hashes[-1]))

    def keep_states(self, seq_index: int, block_hash: BlockHash) -> None:
        """Keep a sequence's states as those behind a block."""
        if self._snapshots is not None and self.enabled:
            self._snapshots.put(block_hash, self._cache.states.snapshot(seq_index))

    def snapshots(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, Snapshot]:
        """The states that are kept behind some of these blocks."""
        if self._snapshots is None:
            return {}
        return {block_hash: self._snapshots.get(block_hash) for block_hash in hashes if block_hash in self._snapshots}

    def put_snapshots(self, snapshots: Mapping[BlockHash, Mapping[int, LayerState]]) -> None:
        """Keep states behind blocks as another engine's `snapshots` gave them."""
        if self._snapshots is not None and self.enabled:
            for block_hash, snapshot in snapshots.items():
                self._snapshots.put(block_hash, dict(snapshot))

    def count(self, num_tokens: int, num_found: int) -> None:
        """Count a prompt's tokens and those of them that were found."""
        self.num_queries += num_tokens
        self.num_hits += num_found

    def put(self, seq_index: int, hashes: Sequence[BlockHash]) -> None:
        """Store a sequence's first blocks in every layer, as many as there are hashes."""
        if not self.enabled:
            return
        for i in range(len(hashes) - 1, -1, -1):
            ids = self._cache.block_tables[:, seq_index, i].copy()
            if hashes[i] in self._entries:
                self._entries.move_to_end(hashes[i])
                self._complete(self._entries[hashes[i]], ids)
                continue
            self._cache.add_reference(ids)
            self._entries[hashes[i]] = ids
            self._hold(ids)

    def _complete(self, held: IntArray, ids: IntArray) -> None:
        """Add to an entry the blocks that it lacks because they were freed."""
        lacks = (held == NULL_BLOCK) & (ids != NULL_BLOCK) if self._cache.windows else np.zeros(len(held), dtype=bool)
        if lacks.any():
            held[lacks] = ids[lacks]
            self._cache.add_reference(ids[lacks])
            self._hold(ids[lacks])

    def _hold(self, ids: IntArray) -> None:
        self._is_held[ids] = True
        self._is_held[: self._cache.windows.num_reserved] = False

    def name(self, key: str, block_hash: BlockHash, num_tokens: int) -> None:
        """Give the beginning of a prompt that ends with a block a name, for `held_names`. The oldest are forgotten."""
        self._names.pop(key, None)
        self._names[key] = block_hash, num_tokens
        if len(self._names) > MAX_NAMES:
            self._names.pop(next(iter(self._names)), None)

    @property
    def held_names(self) -> dict[str, int]:
        """Named beginnings that are still held, with their numbers of tokens. Any thread may read this."""
        return {key: count for key, (block_hash, count) in list(self._names.items()) if block_hash in self._entries}

    def make_room(self, num_blocks: int) -> bool:
        """Evict entries that no sequence uses until `num_blocks` blocks are free. Whether that succeeded.

        Where it cannot succeed, nothing is evicted.
        """
        if self._cache.num_free_blocks >= num_blocks:
            return True
        if self._cache.num_free_blocks + self._num_idle < num_blocks:
            return False
        for block_hash in list(self._entries):
            ids = self._entries[block_hash]
            if (self._cache.references[ids] == 1).all():
                self._release(ids)
                del self._entries[block_hash]
                if self._snapshots is not None:
                    self._snapshots.drop(block_hash)
                if self._cache.num_free_blocks >= num_blocks:
                    return True
        return self._strip(num_blocks)

    def _strip(self, num_blocks: int) -> bool:
        """Free blocks before sliding windows in entries that sequences use, until `num_blocks` are free."""
        layers = self._cache.windows.layers.tolist()
        for ids in self._entries.values() if layers else ():
            idle = [layer for layer in layers if ids[layer] != NULL_BLOCK and self._cache.references[ids[layer]] == 1]
            if idle:
                self._release(ids[idle])
                ids[idle] = NULL_BLOCK
                if self._cache.num_free_blocks >= num_blocks:
                    return True
        return False

    def clear(self) -> None:
        """Evict every entry."""
        for ids in self._entries.values():
            self._release(ids)
        self._entries.clear()
        if self._snapshots is not None:
            self._snapshots.clear()

    def _release(self, ids: IntArray) -> None:
        self._is_held[ids] = False
        self._cache.drop_reference(ids)

    @property
    def held(self) -> IntArray:
        """Every block id that an entry references, for `KVCache.check`."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *self._entries.values()])
