"""Reducers in decode: which generated tokens later tokens may attend to.

At the input of one layer a reducer sees the hidden states of generated tokens and says which are kept. A dropped token
sees itself: its keys and values are in the cache while its own step runs. After the step they leave the cache in this
layer and those above. The tokens of a draft share a step, and so do those that are computed again after a preemption.
There a mask hides the dropped ones from those after them, so that every token sees what it would have seen alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm.data.arrays import BoolArray, IntArray, to_tensor
from mm.engine.kv_cache.blocks import KVCache
from mm.errors import MmError, ReducerFault
from mm.plugins.calls import PluginCalls
from mm.plugins.reducer import PerToken
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors


@dataclass(kw_only=True, eq=False)
class TokenPruning:
    """What is decided about the generated tokens of one request.

    Attributes:
        reducer: Decides.
        layer: At the input of this layer.
        calls: Calls the reducer.
        error: What the reducer did wrong. From then on all tokens are kept.
    """

    reducer: PerToken
    layer: int
    calls: PluginCalls
    error: MmError | None = None


@dataclass(kw_only=True, eq=False)
class Candidates:
    """Generated tokens of one sequence in a step, and what is decided about them.

    Attributes:
        pruning: The request's.
        indices: (n,) the place of each in the sequence's output.
        known: Decisions that were made when the first of these tokens were computed before. They are made once.
        is_kept: (n,) bool, after the layer.
    """

    pruning: TokenPruning
    indices: IntArray
    known: Sequence[bool] = ()
    is_kept: BoolArray

    @classmethod
    def of(cls, pruning: TokenPruning, indices: Sequence[int], known: Sequence[bool] = ()) -> Candidates:
        """Tokens about which nothing is decided but `known`."""
        is_kept = np.ones(len(indices), dtype=np.bool_)
        is_kept[: len(known)] = known[: len(indices)]
        return cls(pruning=pruning, indices=np.asarray(indices, dtype=np.int64), known=known, is_kept=is_kept)

    @property
    def is_open(self) -> bool:
        """Whether there is anything to ask the reducer."""
        return self.pruning.error is None and len(self.known) < len(self.indices)

    def mask(self, seen: Tensor) -> Tensor:
        """(n, n) bool: of what each token sees (n, n), only what is kept and itself."""
        kept = to_tensor(self.is_kept, seen.device)
        return seen & (kept | torch.eye(len(kept), dtype=torch.bool, device=seen.device))

    def forget(self, cache: KVCache, seq_index: int, path: Sequence[int]) -> list[bool]:
        """Remove from the cache what is not kept, and what is not on the path. Returns the decisions along it.

        Args:
            path: Ascending indices of the tokens that the sequence goes on with.
        """
        count, layer = len(self.indices), self.pruning.layer
        kept = [i for i in path if self.is_kept[i]]
        cache.keep_accepted(seq_index, count, path, 0, layer)
        cache.keep_accepted(seq_index, count, kept, layer)
        return [bool(self.is_kept[i]) for i in path]


def decide(layer: int, hidden: Tensor, groups: Sequence[tuple[Candidates, int]]) -> bool:
    """Ask the reducers of a layer about the tokens of a step, each reducer once.

    A reducer that fails affects only the requests that use it: the error is noted, and their tokens are kept.

    Args:
        hidden: (T, D), the layer's input.
        groups: Candidates with the row of their first token; a group's rows follow each other.

    Returns:
        Whether any token of a group of several is dropped, so that attention needs other masks.
    """
    asked: dict[int, list[tuple[Candidates, int]]] = {}
    mine = [(group, row) for group, row in groups if group.pruning.layer == layer]
    for group, row in mine:
        if group.is_open:
            asked.setdefault(id(group.pruning.reducer), []).append((group, row))
    for members in asked.values():
        rows = np.concatenate([np.arange(row, row + len(group.indices)) for group, row in members])
        indices = np.concatenate([group.indices for group, _ in members])
        try:
            is_kept = _ask(members[0][0].pruning, hidden, rows, indices)
        except MmError as error:
            for group, _ in members:
                group.pruning.error = error
            continue
        at = 0
        for group, _ in members:
            start, at = at + len(group.known), at + len(group.indices)
            group.is_kept[len(group.known) :] = is_kept[start:at]
    return any(len(group.indices) > 1 and not group.is_kept.all() for group, _ in mine)


def _ask(pruning: TokenPruning, hidden: Tensor, rows: IntArray, indices: IntArray) -> BoolArray:
    reducer, calls = pruning.reducer, pruning.calls
    name, when = name_of(reducer), f"at layer {pruning.layer}, about generated tokens"

    def ask() -> BoolArray:
        with plugin_errors(name, when):
            states = hidden[to_tensor(rows, hidden.device)]
            kept = reducer.keep_tokens(states, to_tensor(indices, hidden.device))
            if kept.dtype != torch.bool or kept.shape != (len(rows),):
                raise ReducerFault(name, f"has to return a bool for each of {len(rows)} tokens")
            return kept.cpu().numpy()

    return calls.call("reducer", (name,), when, ask, timeout_s=calls.limits.step_timeout_s, holds_all=True)
