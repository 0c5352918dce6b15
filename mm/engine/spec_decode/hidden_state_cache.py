"""States of prompts' rows, for drafters that read them: what the prefix cache holds is not computed again.

A block of rows has the name that it has in the prefix cache, so entries are of the same text, pictures and tenant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from cachetools import LRUCache
from torch import Tensor

from mm.engine.kv_cache.prefix_cache import BlockHash

Kept = tuple[Tensor, dict[str, Tensor]]
"""Rows (k,) of an answer, and their states (k, D) by name."""


class StateCache:
    """The least recently used blocks leave first.

    Args:
        max_bytes: Of all states.
        block_size: Rows of a block.
    """

    def __init__(self, max_bytes: int, block_size: int) -> None:
        self._size = block_size
        self._blocks: LRUCache[BlockHash, Mapping[str, Tensor]] = LRUCache(max_bytes, getsizeof=_num_bytes)

    @property
    def num_bytes(self) -> int:
        return int(self._blocks.currsize)

    def put(self, names: Sequence[BlockHash], kept: Sequence[Kept]) -> None:
        """Remember the whole blocks of a prompt, as far as there are names.

        Args:
            kept: Rows of the prompt, ascending.
        """
        rows = torch.cat([part for part, _ in kept])
        first, count = int(rows[0]), len(rows)
        if int(rows[-1]) - first + 1 != count:
            return  # some were dropped inside the decoder
        states = {name: torch.cat([part[name] for _, part in kept]) for name in kept[0][1]}
        # From the end, so that a block is never older than those that are found through it.
        for block in reversed(range(-(-first // self._size), min(len(names), (first + count) // self._size))):
            start = block * self._size - first
            known = self._blocks.get(names[block], {})
            entry = {
                name: known[name] if name in known else state[start : start + self._size].clone()
                for name, state in states.items()
            }
            if _num_bytes(entry) <= self._blocks.maxsize:
                self._blocks[names[block]] = {**known, **entry}

    def get(self, names: Sequence[BlockHash], wanted: Collection[str]) -> Kept | None:
        """The states that are wanted of the longest known beginning; None where its first block is not known."""
        found: list[Mapping[str, Tensor]] = []
        for name in names:
            entry = self._blocks.get(name)
            if entry is None or not set(wanted) <= entry.keys():
                break
            found.append(entry)
        for name in reversed(names[: len(found)]):
            self._blocks.get(name)  # used now
        if not found:
            return None
        states = {name: torch.cat([entry[name] for entry in found]) for name in wanted}
        return torch.arange(len(found) * self._size), states


def _num_bytes(states: Mapping[str, Tensor]) -> int:
    return sum(state.numel() * state.element_size() for state in states.values())
