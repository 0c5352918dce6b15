"""Keys and values of every sequence, in blocks. Everything that touches the cache's layout or counts its bytes is here.

A block holds `block_size` rows of one layer and belongs to no layer until it is given out: one pool for all of them.
So a token that is dropped at layer K frees memory which any sequence may use in any layer, below K too; with a pool per
layer the lower ones would run full while the upper ones stand empty. Keys and values are two tensors.

A sequence lives in a slot. Layers that hold the same rows form a segment; `lengths[layer, slot]` says how many, and
`block_tables[layer, slot]` which blocks hold them. A token's slot in the cache and its rotary position are different
things.

Blocks are shared by counting references: prefixes that several sequences begin with, and the prompt of several answers.
Whoever writes into a block that is not its own alone gets a copy of it first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec


class OutOfBlocks(EngineError):
    """There are too few free blocks; the scheduler makes room and tries again."""


class KVCache:
    """The pool, and the tables of the sequences that live in it.

    Args:
        num_blocks: Size of the pool.
        num_slots: Sequences at a time.

    Attributes:
        keys, values: (num_blocks, block_size, num_heads, head_dim).
        block_tables: (num_layers, num_slots, W) int32, block ids; only the first ceil(length / block_size) count.
        lengths: (num_layers, num_slots) int64, rows held.
    """

    def __init__(self, shape: KVCacheSpec, *, num_blocks: int, num_slots: int) -> None:
        self.shape = shape
        size = (num_blocks, shape.block_size, shape.num_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.values = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.num_blocks = num_blocks
        self.block_tables = np.zeros((shape.num_layers, num_slots, 8), dtype=np.int32)
        self.lengths = np.zeros((shape.num_layers, num_slots), dtype=np.int64)
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack; low ids are given out first
        self._num_free = num_blocks
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._layers = np.arange(shape.num_layers)

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    @property
    def num_used_bytes(self) -> int:
        """Bytes of all blocks that somebody holds; a shared one counts once."""
        return (self.num_blocks - self._num_free) * self.shape.block_bytes

    def allocate(self) -> int:
        """A free slot, empty."""
        slot = self._free_slots.pop()
        self.lengths[:, slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Give back the slot and every block that nobody else holds."""
        for layer in range(self.shape.num_layers):
            self.drop_reference(self.blocks(layer, slot))
        self.lengths[:, slot] = 0
        self._free_slots.append(slot)

    def blocks(self, layer: int, slot: int) -> np.ndarray:
        """Ids of the blocks that hold a slot's rows in a layer, in order; a view."""
        return self.block_tables[layer, slot, : self.shape.num_blocks(int(self.lengths[layer, slot]))]

    def held_bytes(self, slot: int) -> int:
        """Bytes of all blocks in a slot's tables, shared ones included."""
        per_layer = -(-self.lengths[:, slot] // self.shape.block_size)
        return int(per_layer.sum()) * self.shape.block_bytes

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def num_blocks_for(self, slot: int, num_rows: int) -> int:
        """Free blocks that `append_slots` of all layers by `num_rows` takes, copies of shared blocks included."""
        size, lengths = self.shape.block_size, self.lengths[:, slot]
        more = int((-(-(lengths + num_rows) // size)).sum() - (-(-lengths // size)).sum())
        return more + len(self._shared_tails(slot, self._layers)) if num_rows else 0

    def append_slots(self, slot: int, num_rows: int, start: int = 0, stop: int | None = None) -> None:
        """Make room for `num_rows` rows behind those that layers start..stop hold, and count them as held.

        Raises:
            OutOfBlocks: Nothing was changed.
        """
        layers = self._layers[start:stop]
        size, lengths = self.shape.block_size, self.lengths[layers, slot]
        held, wanted = -(-lengths // size), -(-(lengths + num_rows) // size)
        tails = self._shared_tails(slot, layers)
        num_new = int((wanted - held).sum())
        if num_new + len(tails) > self._num_free:
            raise OutOfBlocks(f"{num_new + len(tails)} blocks are needed and {self._num_free} are free")
        self._unshare(slot, tails)
        if num_new:
            self._widen(int(wanted.max()))
            ids, at = self._take(num_new), 0
            for layer, old, new in zip(layers.tolist(), held.tolist(), wanted.tolist(), strict=True):
                self.block_tables[layer, slot, old:new] = ids[at : at + new - old]
                at += new - old
        self.lengths[layers, slot] = lengths + num_rows

    def num_blocks_for_each(self, slots: np.ndarray) -> int:
        """Free blocks that `append_slot_each` has to find; sequences that share a last block may need
        fewer."""
        lengths, shared = self._tails(slots)
        return int((lengths % self.shape.block_size == 0).sum() + shared.sum())

    def append_slot_each(self, slots: np.ndarray) -> None:
        """`append_slots` of every layer of many slots by one row each, as decoding does it.

        Raises:
            OutOfBlocks: Nothing was changed.
        """
        lengths, shared = self._tails(slots)
        layers, which = np.nonzero(lengths % self.shape.block_size == 0)
        num_shared = int(shared.sum())
        if len(layers) + num_shared > self._num_free:
            raise OutOfBlocks(f"{len(layers) + num_shared} blocks are needed and {self._num_free} are free")
        if num_shared:
            for i in np.flatnonzero(shared.any(axis=0)).tolist():
                # Asked again: a block that two of them share is the second one's own once the first has left it.
                self._unshare(int(slots[i]), self._shared_tails(int(slots[i]), self._layers))
        if len(layers):
            places = lengths[layers, which] // self.shape.block_size
            self._widen(int(places.max()) + 1)
            self.block_tables[layers, slots[which], places] = self._take(len(layers))
        self.lengths[:, slots] = lengths + 1

    def _tails(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(num_layers, n) lengths, and whether the last block is partly filled and held by others too."""
        size = self.shape.block_size
        lengths = self.lengths[:, slots]
        last = self.block_tables[self._layers[:, None], slots, np.maximum(lengths - 1, 0) // size]
        return lengths, (lengths % size != 0) & (self._references[last] > 1)

    def truncate(self, slot: int, layer: int, length: int) -> None:
        """Forget a layer's rows from `length` on."""
        kept = self.shape.num_blocks(length)
        self.drop_reference(self.blocks(layer, slot)[kept:])
        self.lengths[layer, slot] = length

    def keep_tokens(self, slot: int, layer: int, rows: Tensor) -> None:
        """Keep only `rows` (ascending indices) of those that a layer holds, densely, in their order.

        Blocks before the first row that goes stay as they are, shared or not.

        Raises:
            OutOfBlocks: Shared blocks have to be copied and there is no room; nothing was changed.
        """
        kept, size = rows.cpu().numpy(), self.shape.block_size
        moved = np.flatnonzero(kept != np.arange(len(kept)))
        if not len(moved):
            return self.truncate(slot, layer, len(kept))
        start = int(moved[0]) // size * size
        num_new = self.shape.num_blocks(len(kept) - start)
        own = int((self._references[self.blocks(layer, slot)[start // size :]] == 1).sum())
        if num_new > self._num_free + own:
            raise OutOfBlocks(f"{num_new} blocks are needed and {self._num_free + own} are free")
        flat_keys, flat_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        source = torch.from_numpy(self.slot_mapping(layer, slot)[kept[start:]]).to(self.keys.device)
        keys, values = flat_keys[source], flat_values[source]
        self.truncate(slot, layer, start)
        self.append_slots(slot, len(kept) - start, layer, layer + 1)
        target = torch.from_numpy(self.slot_mapping(layer, slot, start)).to(self.keys.device)
        flat_keys[target], flat_values[target] = keys, values

    def keep_accepted(self, slot: int, count: int, path: Sequence[int]) -> None:
        """Of a slot's last `count` rows keep those of `path`, in every layer, densely.

        For rows that one `append_slots` made room for: their blocks are the slot's own.

        Args:
            path: Ascending, counted from the first of these rows.
        """
        base = self.lengths[:, slot] - count
        if path[-1] != len(path) - 1:
            source, target = (
                torch.from_numpy(self._slot_mapping_after(slot, base, rows)).to(self.keys.device)
                for rows in (np.array(path), np.arange(len(path)))
            )
            for pool in (self.keys.flatten(0, 1), self.values.flatten(0, 1)):
                pool[target] = pool[source]
        self._cut(slot, base + len(path))

    def _slot_mapping_after(self, slot: int, base: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(layers * n,) places of the rows that lie `rows` behind each layer's `base`."""
        size, at = self.shape.block_size, base[:, None] + rows
        blocks = self.block_tables[self._layers[:, None], slot, at // size].astype(np.int64)
        return (blocks * size + at % size).ravel()

    def _cut(self, slot: int, lengths: np.ndarray) -> None:
        """Forget each layer's rows from `lengths` on."""
        size, held = self.shape.block_size, -(-self.lengths[:, slot] // self.shape.block_size)
        wanted = -(-lengths // size)
        for layer in np.flatnonzero(held > wanted).tolist():
            self.drop_reference(self.block_tables[layer, slot, wanted[layer] : held[layer]])
        self.lengths[:, slot] = lengths

    def slot_mapping(self, layer: int, slot: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(n,) int64: where in the flattened pool (num_blocks * block_size rows) rows start..stop of a layer are."""
        size = self.shape.block_size
        rows = np.arange(start, int(self.lengths[layer, slot]) if stop is None else stop)
        return self.block_tables[layer, slot, rows // size].astype(np.int64) * size + rows % size

    # ── sharing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(self, slot: int) -> int:
        """A new slot that holds the same rows by reference."""
        copy = self.allocate()
        self.block_tables[:, copy] = self.block_tables[:, slot]
        self.lengths[:, copy] = self.lengths[:, slot]
        for layer in range(self.shape.num_layers):
            self.add_reference(self.blocks(layer, copy))
        return copy

    def share(self, slot: int, ids: np.ndarray) -> None:
        """Begin an empty slot with whole blocks that are held elsewhere.

        Args:
            ids: (num_layers, n) block ids.
        """
        if not ids.shape[1]:
            return
        self._widen(ids.shape[1])
        self.block_tables[:, slot, : ids.shape[1]] = ids
        self.lengths[:, slot] = ids.shape[1] * self.shape.block_size
        self.add_reference(ids.ravel())

    def add_reference(self, ids: np.ndarray) -> None:
        """Hold blocks once more. An id may be named once per call."""
        self._references[ids] += 1

    def drop_reference(self, ids: np.ndarray) -> None:
        """Hold blocks once less; those that nobody holds any more are free."""
        if not len(ids):
            return
        self._references[ids] -= 1
        gone = ids[self._references[ids] == 0]
        self._free[self._num_free : self._num_free + len(gone)] = gone
        self._num_free += len(gone)

    def num_references(self, ids: np.ndarray) -> np.ndarray:
        return self._references[ids]

    @property
    def references(self) -> np.ndarray:
        """(num_blocks,) how often each block is held; not to be written."""
        return self._references

    def _take(self, count: int) -> np.ndarray:
        self._num_free -= count
        ids = self._free[self._num_free : self._num_free + count][::-1].copy()
        self._references[ids] = 1
        return ids

    def _shared_tails(self, slot: int, layers: np.ndarray) -> np.ndarray:
        """Layers whose last block is partly filled and held by others too: it has to be copied before it is written."""
        lengths = self.lengths[layers, slot]
        partial = lengths % self.shape.block_size != 0
        last = self.block_tables[layers, slot, np.maximum(lengths - 1, 0) // self.shape.block_size]
        return layers[partial & (self._references[last] > 1)]

    def _unshare(self, slot: int, layers: np.ndarray) -> None:
        if not len(layers):
            return
        last = (self.lengths[layers, slot] - 1) // self.shape.block_size
        shared, own = self.block_tables[layers, slot, last], self._take(len(layers))
        source, target = torch.from_numpy(shared.astype(np.int64)), torch.from_numpy(own.astype(np.int64))
        self.keys[target.to(self.keys.device)] = self.keys[source.to(self.keys.device)]
        self.values[target.to(self.values.device)] = self.values[source.to(self.values.device)]
        self._references[shared] -= 1
        self.block_tables[layers, slot, last] = own

    def _widen(self, num_columns: int) -> None:
        width = self.block_tables.shape[2]
        if num_columns > width:
            wider = np.zeros((*self.block_tables.shape[:2], max(num_columns, 2 * width)), dtype=np.int32)
            wider[:, :, :width] = self.block_tables
            self.block_tables = wider

    def check(self, shared: np.ndarray | None = None) -> None:
        """Assert that every reference is accounted for; for tests.

        Args:
            shared: Ids held by others than slots, once per hold.
        """
        counted = np.zeros_like(self._references)
        for slot in range(self.lengths.shape[1]):
            for layer in range(self.shape.num_layers):
                np.add.at(counted, self.blocks(layer, slot), 1)
        if shared is not None:
            np.add.at(counted, shared, 1)
        free = self._free[: self._num_free]
        assert np.array_equal(counted, self._references), "references do not equal the holds"
        assert len(np.unique(free)) == self._num_free == int((counted == 0).sum()), "the free list is wrong"
        assert not counted[free].any(), "a free block is held"
