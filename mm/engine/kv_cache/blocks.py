"""The paged KV cache: keys and values of every sequence, in blocks. Only this file knows the layout and counts bytes.

A block holds `block_size` tokens of one layer. All layers share one pool of blocks, so a block belongs to no layer
until it is allocated. A token that a reducer drops at layer K therefore frees memory for any sequence in any layer.
With a pool per layer, the lower pools would run full while the upper ones stand empty. Keys and values are two tensors.

Each sequence has an index. `lengths[layer, seq_index]` is the number of tokens that a layer holds for it, and
`block_tables[layer, seq_index]` lists the blocks that hold them. A slot is the place of one token in the flattened pool
(block * block_size + offset). It has nothing to do with the token's rotary position.

In layers with a sliding window, blocks before the window are freed; see `windows`.

Blocks are shared by reference counts: between sequences with a common prefix, and between the `n` sequences of one
request. A sequence that writes into a shared block first gets a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import BoolArray, IntArray, to_tensor
from mm.engine.kv_cache.states import SequenceStates
from mm.engine.kv_cache.windows import NULL_BLOCK, NULL_REFERENCES, Windows
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec


class OutOfBlocks(EngineError):
    """There are too few free blocks. The scheduler frees some and tries again."""


class KVCache:
    """The pool of blocks, and the block tables of the sequences in it.

    Args:
        shape: What one token of the model takes.
        num_blocks: How many can be allocated.
        max_num_seqs: Number of sequences that can be held at a time.

    Attributes:
        keys, values: (num_blocks, and one more where there are windows, block_size, num_heads, head_dim).
        block_tables: (num_layers, max_num_seqs, W) int32 block ids. Only the first ceil(length / block_size) are valid.
        lengths: (num_layers, max_num_seqs) int64, tokens held.
        states: Of the layers that have no keys and values.
        windows: Of the layers with a sliding window.
        has_all_heads: Whether all keys and values of the model are here.
    """

    has_all_heads = True

    def __init__(self, shape: KVCacheSpec, *, num_blocks: int, max_num_seqs: int) -> None:
        self.shape = shape
        self.windows = Windows(shape, max_num_seqs)
        pool = num_blocks + self.windows.num_reserved
        size = (pool, shape.block_size, shape.num_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.values = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.num_blocks = self._num_free = num_blocks
        self.block_tables = np.zeros((shape.num_layers, max_num_seqs, 8), dtype=np.int32)
        self.lengths = np.zeros((shape.num_layers, max_num_seqs), dtype=np.int64)
        self._references = np.zeros(pool, dtype=np.int32)
        self._free = np.arange(pool - 1, self.windows.num_reserved - 1, -1, dtype=np.int32)  # a stack: low ids first
        if self.windows:
            self.keys[NULL_BLOCK], self.values[NULL_BLOCK], self._references[NULL_BLOCK] = 0, 0, NULL_REFERENCES
        self._free_seqs = list(range(max_num_seqs - 1, -1, -1))
        self._layers, self.states = np.arange(shape.num_layers), SequenceStates(max_num_seqs)

    # ── sequences ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_free_seqs(self) -> int:
        return len(self._free_seqs)

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    @property
    def num_used_bytes(self) -> int:
        """Bytes of all blocks that are referenced. A shared block counts once."""
        return (self.num_blocks - self._num_free) * self.shape.block_bytes

    def allocate(self) -> int:
        """Take a free sequence index. The sequence holds no tokens yet."""
        seq_index = self._free_seqs.pop()
        self.lengths[:, seq_index] = 0
        self.windows.begin(seq_index)
        return seq_index

    def free(self, seq_index: int) -> None:
        """Release a sequence's index and blocks."""
        for layer in range(self.shape.num_layers):
            self.drop_reference(self.blocks(layer, seq_index))
        self.lengths[:, seq_index] = 0
        self.states.clear(seq_index)
        self._free_seqs.append(seq_index)

    def blocks(self, layer: int, seq_index: int) -> IntArray:
        """Ids of the blocks that hold a sequence's tokens in a layer, in order. The result is a view."""
        return self.block_tables[layer, seq_index, : self.shape.num_blocks(int(self.lengths[layer, seq_index]))]

    # ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def num_blocks_for(self, seq_index: int, num_tokens: int) -> int:
        """Free blocks that `append_slots` of all layers by `num_tokens` takes, including copies of shared blocks."""
        size, lengths = self.shape.block_size, self.lengths[:, seq_index]
        more = int((-(-(lengths + num_tokens) // size)).sum() - (-(-lengths // size)).sum())
        return more + len(self._shared_tails(seq_index, self._layers)) if num_tokens else 0

    def append_slots(self, seq_index: int, num_tokens: int | IntArray, start: int = 0, stop: int | None = None) -> None:
        """Allocate slots for `num_tokens` new tokens, or as many for each of layers start..stop; count them as held.

        Raises:
            OutOfBlocks: There are too few free blocks. Nothing was changed.
        """
        layers = self._layers[start:stop]
        size, lengths = self.shape.block_size, self.lengths[layers, seq_index]
        held, wanted = -(-lengths // size), -(-(lengths + num_tokens) // size)
        tails = self._shared_tails(seq_index, layers)
        num_new = int((wanted - held).sum())
        if num_new + len(tails) > self._num_free:
            raise OutOfBlocks(f"{num_new + len(tails)} blocks are needed and {self._num_free} are free")
        self._unshare(seq_index, tails)
        if num_new:
            self._widen(int(wanted.max()))
            ids, at = self._take(num_new), 0
            for layer, old, new in zip(layers.tolist(), held.tolist(), wanted.tolist(), strict=True):
                self.block_tables[layer, seq_index, old:new] = ids[at : at + new - old]
                at += new - old
        self.lengths[layers, seq_index] = lengths + num_tokens

    def num_blocks_for_each(self, seq_indices: IntArray) -> int:
        """Upper bound of the blocks that `append_slot_each` takes. Sequences that share a last block may need fewer."""
        lengths, shared = self._tails(seq_indices)
        return int((lengths % self.shape.block_size == 0).sum() + shared.sum())

    def append_slot_each(self, seq_indices: IntArray) -> None:
        """Allocate one slot in every layer for each of many sequences, as a decoding step needs it.

        Raises:
            OutOfBlocks: There are too few free blocks. Nothing was changed.
        """
        lengths, shared = self._tails(seq_indices)
        layers, which = np.nonzero(lengths % self.shape.block_size == 0)
        num_shared = int(shared.sum())
        if len(layers) + num_shared > self._num_free:
            raise OutOfBlocks(f"{len(layers) + num_shared} blocks are needed and {self._num_free} are free")
        if num_shared:
            for i in np.flatnonzero(shared.any(axis=0)).tolist():
                # Looked up again: a block shared by two of them belongs to the second alone once the first left it.
                seq_index = int(seq_indices[i])
                self._unshare(seq_index, self._shared_tails(seq_index, self._layers))
        if len(layers):
            columns = lengths[layers, which] // self.shape.block_size
            self._widen(int(columns.max()) + 1)
            self.block_tables[layers, seq_indices[which], columns] = self._take(len(layers))
        self.lengths[:, seq_indices] = lengths + 1

    def remove_skipped_blocks(self, seq_indices: IntArray) -> None:
        """Free the blocks before the sliding windows of some sequences."""
        lengths = self.lengths[self.windows.layers[:, None], seq_indices]
        for layer, seq_index, start, stop in self.windows.skipped(lengths, seq_indices):
            self.drop_reference(self.block_tables[layer, seq_index, start:stop].copy())
            self.block_tables[layer, seq_index, start:stop] = NULL_BLOCK

    def _tails(self, seq_indices: IntArray) -> tuple[IntArray, BoolArray]:
        """(num_layers, n) lengths, and whether the last block is partly filled and shared."""
        size = self.shape.block_size
        lengths = self.lengths[:, seq_indices]
        last = self.block_tables[self._layers[:, None], seq_indices, np.maximum(lengths - 1, 0) // size]
        return lengths, (lengths % size != 0) & (self._references[last] > 1)

    def truncate(self, seq_index: int, layer: int, length: int) -> None:
        """Keep only the first `length` tokens of a layer."""
        kept = self.shape.num_blocks(length)
        self.drop_reference(self.blocks(layer, seq_index)[kept:])
        self.lengths[layer, seq_index] = length

    def keep_tokens(self, seq_index: int, layer: int, tokens: Tensor) -> None:
        """Keep only some of a layer's tokens, in their order and without gaps.

        Blocks before the first removed token stay as they are, shared or not.

        Args:
            tokens: (n,) int64, ascending indices of the tokens to keep.

        Raises:
            OutOfBlocks: Shared blocks have to be copied and too few are free. Nothing was changed.
        """
        kept, size = tokens.cpu().numpy(), self.shape.block_size
        moved = np.flatnonzero(kept != np.arange(len(kept)))
        if not len(moved):
            return self.truncate(seq_index, layer, len(kept))
        start = int(moved[0]) // size * size
        num_new = self.shape.num_blocks(len(kept) - start)
        own = int((self._references[self.blocks(layer, seq_index)[start // size :]] == 1).sum())
        if num_new > self._num_free + own:
            raise OutOfBlocks(f"{num_new} blocks are needed and {self._num_free + own} are free")
        flat_keys, flat_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        source = to_tensor(self.slot_mapping(layer, seq_index)[kept[start:]], self.keys.device)
        keys, values = flat_keys[source], flat_values[source]
        self.truncate(seq_index, layer, start)
        self.append_slots(seq_index, len(kept) - start, layer, layer + 1)
        target = to_tensor(self.slot_mapping(layer, seq_index, start), self.keys.device)
        flat_keys[target], flat_values[target] = keys, values

    def keep_accepted(
        self, seq_index: int, count: int, path: Sequence[int], start: int = 0, stop: int | None = None
    ) -> None:
        """Of a sequence's last `count` tokens keep those on the accepted path, in layers start..stop and without gaps.

        These tokens have to come from one `append_slots`, so that their blocks belong to the sequence alone.

        Args:
            path: Ascending indices, counted from the first of these tokens.
        """
        layers = self._layers[start:stop]
        base = self.lengths[layers, seq_index] - count
        self.states.rewind(seq_index, None if len(path) == count else len(path))
        if path and path[-1] != len(path) - 1:
            source, target = (
                to_tensor(self._slot_mapping_from(seq_index, layers, base, offsets), self.keys.device)
                for offsets in (np.array(path), np.arange(len(path)))
            )
            for pool in (self.keys.flatten(0, 1), self.values.flatten(0, 1)):
                pool[target] = pool[source]
        self._truncate_each(seq_index, layers, base + len(path))

    def _slot_mapping_from(self, seq_index: int, layers: IntArray, base: IntArray, offsets: IntArray) -> IntArray:
        """(len(layers) * n,) slots of the tokens `base[i] + offsets` of each layer."""
        size, at = self.shape.block_size, base[:, None] + offsets
        blocks = self.block_tables[layers[:, None], seq_index, at // size].astype(np.int64)
        return (blocks * size + at % size).ravel()

    def _truncate_each(self, seq_index: int, layers: IntArray, lengths: IntArray) -> None:
        """Keep only the first `lengths[i]` tokens of each layer."""
        size, held = self.shape.block_size, -(-self.lengths[layers, seq_index] // self.shape.block_size)
        wanted = -(-lengths // size)
        for i in np.flatnonzero(held > wanted).tolist():
            self.drop_reference(self.block_tables[layers[i], seq_index, wanted[i] : held[i]])
        self.lengths[layers, seq_index] = lengths

    def slot_mapping(self, layer: int, seq_index: int, start: int = 0, stop: int | None = None) -> IntArray:
        """(n,) int64: the slots of tokens start..stop of a layer in the flattened pool (num_blocks * block_size)."""
        size = self.shape.block_size
        tokens = np.arange(start, int(self.lengths[layer, seq_index]) if stop is None else stop)
        return self.block_tables[layer, seq_index, tokens // size].astype(np.int64) * size + tokens % size

    def read(self, layer: int, seq_index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (n, num_heads, head_dim) that a layer holds for a sequence."""
        slots = to_tensor(self.slot_mapping(layer, seq_index), self.keys.device)
        return self.keys.flatten(0, 1)[slots], self.values.flatten(0, 1)[slots]

    # ── sharing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(self, seq_index: int) -> int:
        """A new sequence that references the same blocks."""
        copy = self.allocate()
        self.windows.begin(copy, seq_index)
        self.block_tables[:, copy] = self.block_tables[:, seq_index]
        self.lengths[:, copy] = self.lengths[:, seq_index]
        for layer in range(self.shape.num_layers):
            self.add_reference(self.blocks(layer, copy))
        self.states.restore(copy, self.states.snapshot(seq_index))
        return copy

    def share(self, seq_index: int, ids: IntArray) -> None:
        """Begin an empty sequence with full blocks that are referenced elsewhere too.

        Args:
            ids: (num_layers, n) block ids, `NULL_BLOCK` where they lie before the window of a layer.
        """
        if not ids.shape[1]:
            return
        self._widen(ids.shape[1])
        self.block_tables[:, seq_index, : ids.shape[1]] = ids
        self.lengths[:, seq_index] = ids.shape[1] * self.shape.block_size
        self.add_reference(ids.ravel())

    def add_reference(self, ids: IntArray) -> None:
        """Add a reference to each block. An id may occur only once per call, but for `NULL_BLOCK`."""
        self._references[ids] += 1
        self._references[: self.windows.num_reserved] = NULL_REFERENCES

    def drop_reference(self, ids: IntArray) -> None:
        """Drop a reference to each block. Blocks without references become free."""
        if not len(ids):
            return
        self._references[ids] -= 1
        self._references[: self.windows.num_reserved] = NULL_REFERENCES
        gone = ids[self._references[ids] == 0]
        self._free[self._num_free : self._num_free + len(gone)] = gone
        self._num_free += len(gone)

    @property
    def references(self) -> IntArray:
        """(num_blocks,) counts. Read only."""
        return self._references

    def _take(self, count: int) -> IntArray:
        self._num_free -= count
        ids = self._free[self._num_free : self._num_free + count][::-1].copy()
        self._references[ids] = 1
        return ids

    def _shared_tails(self, seq_index: int, layers: IntArray) -> IntArray:
        """Layers whose last block is partly filled and shared. It has to be copied before it is written."""
        lengths = self.lengths[layers, seq_index]
        partial = lengths % self.shape.block_size != 0
        last = self.block_tables[layers, seq_index, np.maximum(lengths - 1, 0) // self.shape.block_size]
        return layers[partial & (self._references[last] > 1)]

    def _unshare(self, seq_index: int, layers: IntArray) -> None:
        """Copy the last block of some layers, so that the sequence can write into it."""
        if not len(layers):
            return
        last = (self.lengths[layers, seq_index] - 1) // self.shape.block_size
        shared, own = self.block_tables[layers, seq_index, last], self._take(len(layers))
        device = self.keys.device
        source, target = to_tensor(shared.astype(np.int64), device), to_tensor(own.astype(np.int64), device)
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]
        self._references[shared] -= 1
        self.block_tables[layers, seq_index, last] = own

    def _widen(self, num_columns: int) -> None:
        """Make the block tables at least `num_columns` wide."""
        width = self.block_tables.shape[2]
        if num_columns > width:
            wider = np.zeros((*self.block_tables.shape[:2], max(num_columns, 2 * width)), dtype=np.int32)
            wider[:, :, :width] = self.block_tables
            self.block_tables = wider

    def check(self, shared: IntArray | None = None) -> None:
        """Assert that reference counts and free list are right, with `shared`, what not a sequence references."""
        counted = np.zeros_like(self._references)
        for seq_index in range(self.lengths.shape[1]):
            for layer in range(self.shape.num_layers):
                np.add.at(counted, self.blocks(layer, seq_index), 1)
        if shared is not None:
            np.add.at(counted, shared, 1)
        counted[: self.windows.num_reserved] = NULL_REFERENCES
        free = self._free[: self._num_free]
        assert np.array_equal(counted, self._references), "the reference counts are wrong"
        assert len(np.unique(free)) == self._num_free == int((counted == 0).sum()), "the free list is wrong"
        assert not counted[free].any(), "a free block is referenced"
