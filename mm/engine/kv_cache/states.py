"""The states of a decoder's recurrent layers, per sequence, and snapshots of them at borders of blocks.

Keys and values can be cut behind any token. A state cannot, so it is kept where it will be needed again: before a
draft is verified, and where a prompt may be shared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from mm.data.tokens import Prompt
from mm.models.kv_cache_spec import KVCacheSpec
from mm.models.recurrent import LayerState

Snapshot = dict[int, LayerState]
"""Layer to its state."""


class SequenceStates:
    """The states of every sequence in a `KVCache`. It implements `mm.models.recurrent.States`.

    Args:
        max_num_seqs: Number of sequences that can be held at a time.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._of_seq: list[Snapshot] = [{} for _ in range(max_num_seqs)]
        self._replays: dict[int, dict[int, Callable[[int], LayerState]]] = {}

    def get(self, layer: int, seq_index: int) -> LayerState | None:
        return self._of_seq[seq_index].get(layer)

    def put(self, layer: int, seq_index: int, state: LayerState) -> None:
        self._of_seq[seq_index][layer] = state

    def note(self, layer: int, seq_index: int, replay: Callable[[int], LayerState]) -> None:
        if seq_index in self._replays:
            self._replays[seq_index][layer] = replay

    def keep_for_rewind(self, seq_index: int) -> None:
        """Let the next chunk of a sequence be one of which only the first tokens may count."""
        self._replays[seq_index] = {}

    def rewind(self, seq_index: int, count: int | None) -> None:
        """Of the chunk that was announced by `keep_for_rewind` only the first `count` tokens count; None is all."""
        replays = self._replays.pop(seq_index, {})
        if count is not None:
            for layer, replay in replays.items():
                self.put(layer, seq_index, replay(count))

    def clear(self, seq_index: int) -> None:
        """Forget a sequence."""
        self._of_seq[seq_index] = {}
        self._replays.pop(seq_index, None)

    def snapshot(self, seq_index: int) -> Snapshot:
        """A sequence's states as they are now."""
        return dict(self._of_seq[seq_index])

    def restore(self, seq_index: int, snapshot: Snapshot) -> None:
        """Begin a sequence with the states of another one."""
        self._of_seq[seq_index] = dict(snapshot)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states of all sequences. What sequences share is counted for each."""
        return sum(state.num_bytes for states in self._of_seq for state in states.values())


class Snapshots:
    """Block hash to the states behind that block, least recently used first.

    Args:
        max_bytes: When all are larger, the least recently used ones are dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, Snapshot] = OrderedDict()

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._entries

    def get(self, block_hash: bytes) -> Snapshot:
        self._entries.move_to_end(block_hash)
        return self._entries[block_hash]

    def put(self, block_hash: bytes, snapshot: Snapshot) -> None:
        self.drop(block_hash)
        self._entries[block_hash] = snapshot
        self.num_bytes += _num_bytes(snapshot)
        while self.num_bytes > self._max_bytes and self._entries:
            self.drop(next(iter(self._entries)))

    def drop(self, block_hash: bytes) -> None:
        """Forget the states behind a block, if there are any."""
        if (gone := self._entries.pop(block_hash, None)) is not None:
            self.num_bytes -= _num_bytes(gone)

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0


def _num_bytes(snapshot: Snapshot) -> int:
    return sum(state.num_bytes for state in snapshot.values())


def snapshot_borders(prompt: Prompt, num_blocks: int, shape: KVCacheSpec) -> tuple[int, ...]:
    """Numbers of first tokens behind which other requests may go on: those up to the media, and all that are shared.

    Args:
        num_blocks: Blocks of the prompt that other requests may share.
    """
    if not shape.has_states:
        return ()
    visual = prompt.is_visual.nonzero()
    ends = [num_blocks, (int(visual[-1]) + 1) // shape.block_size if len(visual) else 0]
    return tuple(shape.block_size * end for end in sorted({*ends}) if 0 < end <= num_blocks)
