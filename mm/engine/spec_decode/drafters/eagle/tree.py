"""Dynamic draft trees: the most probable paths, by the drafter's own estimate.

EAGLE-2 (arXiv:2406.16858): a node's score is the sum of the log-probabilities on its path. Each level keeps the best
few nodes as the next frontier, and the best of all candidates are proposed. A chain is a tree of width 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence

import numpy as np

from mm.data.arrays import BoolArray


class DynamicTree:
    """The candidates of one draft. Call `begin` once, then `extend` for each further level.

    Args:
        width: Children considered of a node, and nodes of a frontier.

    Attributes:
        token_ids, parents, depths, scores: Per candidate; a parent is a candidate or -1 for the root, whose
            children have depth 1.
        frontier: Candidates whose children are computed next.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.token_ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.scores: list[float] = []
        self.frontier: list[int] = []

    def begin(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add the root's children, best first."""
        self._add(-1, token_ids, logprobs)
        self.frontier = list(range(len(token_ids)))

    def extend(self, token_ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> None:
        """Add children of every frontier node, best first. The best `width` of them are the new frontier."""
        first = len(self.token_ids)
        for parent, tokens, probs in zip(self.frontier, token_ids, logprobs, strict=True):
            self._add(parent, tokens, probs)
        level = range(first, len(self.token_ids))
        self.frontier = sorted(sorted(level, key=lambda i: (-self.scores[i], i))[: self.width])

    def _add(self, parent: int, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        depth = self.depths[parent] + 1 if parent >= 0 else 1
        score = self.scores[parent] if parent >= 0 else 0.0
        self.token_ids += token_ids
        self.parents += [parent] * len(token_ids)
        self.depths += [depth] * len(token_ids)
        self.scores += [score + logprob for logprob in logprobs]

    def lineage(self, candidates: Sequence[int]) -> list[int]:
        """The candidates and all their ancestors, ascending."""
        found: set[int] = set()
        for candidate in candidates:
            while candidate >= 0 and candidate not in found:
                found.add(candidate)
                candidate = self.parents[candidate]
        return sorted(found)

    def strike(self, token_ids: Collection[int]) -> None:
        """Exclude candidates with these tokens, and everything below them."""
        for i, token in enumerate(self.token_ids):
            parent = self.parents[i]
            if token in token_ids or (parent >= 0 and self.scores[parent] == -math.inf):
                self.scores[i] = -math.inf

    def best(self, count: int, least: float = 0.0) -> tuple[list[int], list[int], list[float]]:
        """The best `count` candidates: token ids, parents (0 is the root, i + 1 the i-th of them), probabilities.

        They are in the order in which they were added, so parents come first. Ties go to the shallower candidate, so
        that no node comes without its parent even where a child's probability rounds to 1.

        Args:
            least: Candidates less probable than this are left out.
        """
        bound = math.log(least) if least > 0 else -sys.float_info.max
        possible = [i for i, score in enumerate(self.scores) if score >= bound]
        order = sorted(possible, key=lambda i: (-self.scores[i], self.depths[i], i))
        kept = sorted(order[:count])
        rows = {candidate: row for row, candidate in enumerate(kept, start=1)} | {-1: 0}
        return (
            [self.token_ids[i] for i in kept],
            [rows[self.parents[i]] for i in kept],
            [math.exp(self.scores[i]) for i in kept],
        )


def ancestor_mask(parents: Sequence[int]) -> BoolArray:
    """(n, n) bool: the ancestors of each of n nodes, itself included. A parent outside of the n is -1."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask
