"""Hidden states of prompts, for drafters that read them.

The prefix cache spares the target the forward over a prompt that it holds. Such a forward would have given the hidden
states that a drafter needs, so they are kept here, in the same blocks and under the same hashes. Equal hashes mean
equal text, equal visual content and the same cache salt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from cachetools import LRUCache
from torch import Tensor

from mm.engine.kv_cache.prefix_cache import BlockHash


class CapturedStates(NamedTuple):
    """Hidden states of some tokens of a sequence.

    Attributes:
        token_indices: (k,) ascending indices of the tokens in the sequence.
        states: Name of the state to (k, D).
    """

    token_indices: Tensor
    states: dict[str, Tensor]

    @property
    def first(self) -> int:
        """Index of the first token."""
        return int(self.token_indices[0])

    @property
    def last(self) -> int:
        """Index of the last token."""
        return int(self.token_indices[-1])


class HiddenStateCache:
    """Keeps hidden states by block, and evicts the least recently used blocks.

    Args:
        max_bytes: Memory of all states.
        block_size: Tokens of a block.
    """

    def __init__(self, max_bytes: int, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: LRUCache[BlockHash, Mapping[str, Tensor]] = LRUCache(max_bytes, getsizeof=_num_bytes)

    @property
    def num_bytes(self) -> int:
        """Memory of the states that are kept now."""
        return int(self._blocks.currsize)

    def put(self, block_hashes: Sequence[BlockHash], captured: Sequence[CapturedStates]) -> None:
        """Keep the full blocks of a prompt, as far as it has hashes.

        Args:
            captured: States of the prompt, in order. Nothing is kept where pruning has removed tokens between them.
        """
        token_indices = torch.cat([part.token_indices for part in captured])
        first, count = int(token_indices[0]), len(token_indices)
        if int(token_indices[-1]) - first + 1 != count:
            return
        states = {name: torch.cat([part.states[name] for part in captured]) for name in captured[0].states}
        first_block, stop_block = -(-first // self._block_size), (first + count) // self._block_size
        # From the end, so that a block is never older than the later blocks, which are useless without it.
        for block in reversed(range(first_block, min(len(block_hashes), stop_block))):
            start = block * self._block_size - first
            known = self._blocks.get(block_hashes[block], {})
            entry = {
                name: known[name] if name in known else state[start : start + self._block_size].clone()
                for name, state in states.items()
            }
            if _num_bytes(entry) <= self._blocks.maxsize:
                self._blocks[block_hashes[block]] = {**known, **entry}

    def get(self, block_hashes: Sequence[BlockHash], names: Collection[str]) -> CapturedStates | None:
        """The states of the longest prefix of a prompt that is kept; None where its first block is not.

        Args:
            names: States that are needed. A block counts only with all of them.
        """
        found: list[Mapping[str, Tensor]] = []
        for block_hash in block_hashes:
            entry = self._blocks.get(block_hash)
            if entry is None or not set(names) <= entry.keys():
                break
            found.append(entry)
        for block_hash in reversed(block_hashes[: len(found)]):
            self._blocks.get(block_hash)  # marks the block as used
        if not found:
            return None
        states = {name: torch.cat([entry[name] for entry in found]) for name in names}
        return CapturedStates(torch.arange(len(found) * self._block_size), states)


def _num_bytes(states: Mapping[str, Tensor]) -> int:
    return sum(state.numel() * state.element_size() for state in states.values())
