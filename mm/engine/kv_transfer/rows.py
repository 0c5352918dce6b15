"""Keys and values out of one cache and into another one. A row is one token of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.data.arrays import IntArray, to_tensor
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_transfer.messages import KVPiece, SequenceHandOff
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec


class SentRows:
    """How much of a sequence was sent.

    Args:
        sequence: Index of its choice.
    """

    def __init__(self, sequence: int, num_layers: int) -> None:
        self.sequence = sequence
        self.lengths: IntArray = np.zeros(num_layers, dtype=np.int64)

    def next_piece(self, cache: KVCache, seq_index: int) -> KVPiece | None:
        """A copy of what the cache holds and was not sent before; None where that is nothing."""
        held = cache.lengths[:, seq_index]
        starts, counts = self.lengths, np.maximum(held - self.lengths, 0)
        if not counts.any():
            return None
        slots = to_tensor(_slots(cache, seq_index, starts, counts), cache.keys.device)
        self.lengths = starts + counts
        return KVPiece(
            sequence=self.sequence,
            starts=tuple(starts.tolist()),
            counts=tuple(counts.tolist()),
            keys=cache.keys.flatten(0, 1)[slots],
            values=cache.values.flatten(0, 1)[slots],
        )


class ReceivedRows:
    """What another engine computed of a sequence, until the cache has room for it.

    Args:
        pieces: Its pieces, in order.

    Raises:
        EngineError: Something is missing, or was computed by another model.
    """

    def __init__(self, state: SequenceHandOff, pieces: Sequence[KVPiece], spec: KVCacheSpec) -> None:
        self.state, self._pieces = state, pieces
        self.lengths = np.array(state.lengths, dtype=np.int64)
        have = np.zeros(spec.num_layers, dtype=np.int64)
        for piece in pieces:
            shape = (sum(piece.counts), spec.num_heads, spec.head_dim)
            is_fitting = piece.keys.shape == piece.values.shape == shape and piece.keys.dtype == spec.dtype
            if not is_fitting or len(piece.counts) != spec.num_layers or tuple(have.tolist()) != piece.starts:
                raise EngineError("keys and values that were handed over do not fit this model, or came out of order")
            have += piece.counts
        if not np.array_equal(have, self.lengths):
            raise EngineError(f"of the tokens that were handed over, {have.tolist()} of {state.lengths} per layer came")

    @property
    def num_bytes(self) -> int:
        """Of keys, values and states."""
        return sum(piece.num_bytes for piece in self._pieces) + self.state.num_bytes

    def num_blocks(self, spec: KVCacheSpec) -> int:
        """Blocks that it takes, and one more in each layer for the next token."""
        return int((-(-(self.lengths + 1) // spec.block_size)).sum())

    def load(self, cache: KVCache, seq_index: int) -> None:
        """Write everything into a sequence that is empty. The cache has room for it."""
        cache.append_slots(seq_index, self.lengths)
        flat_keys, flat_values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        for piece in self._pieces:
            starts, counts = np.array(piece.starts), np.array(piece.counts)
            slots = to_tensor(_slots(cache, seq_index, starts, counts), cache.keys.device)
            flat_keys[slots] = piece.keys.to(cache.keys.device)
            flat_values[slots] = piece.values.to(cache.keys.device)
        cache.states.restore(seq_index, dict(self.state.states))


def _slots(cache: KVCache, seq_index: int, starts: IntArray, counts: IntArray) -> IntArray:
    """(sum of counts,) slots of tokens `starts` to `starts + counts` of each layer."""
    every = zip(starts.tolist(), counts.tolist(), strict=True)
    return np.concatenate(
        [cache.slot_mapping(layer, seq_index, start, start + count) for layer, (start, count) in enumerate(every)]
    )
