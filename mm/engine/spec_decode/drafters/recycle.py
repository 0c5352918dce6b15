"""Token Recycling: propose, as a tree, the tokens that the model last ranked highest after each token.

Paper     Token Recycling (Luo et al., ACL 2025).
Reads     The largest logits of every verified token, the rejected ones too.
Method    A table holds for each token the 8 most probable next tokens, from the last time the model computed them. A
          fixed template of 80 nodes in 6 levels gives the ranks to follow. The budget keeps its most probable nodes.
Cost      One look-up per node, and a top-8 per verified token. The table takes 4 bytes * 8 * vocab.
Differs   A token without an entry proposes nothing; the authors' table begins with token 0. Where a token is in the
          tree several times, its last entry on the accepted path is kept. A small budget drops siblings by rank, with
          measured rates. Drafts are also verified when sampling; the authors' code is greedy only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mm.data.arrays import IntArray
from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.plugins.drafter import Draft, DraftBudget, DraftTarget, Observation

WIDTH = 8
Path = tuple[int, ...]
"""Ranks from the root down to a node."""

CHILDREN: dict[str, int] = (
    {"": 8, "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1}
    | {"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1}
    | {"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1}
    | {"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1}
    | {"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1, "00000": 2, "00010": 1}
)
"""The authors' template: path to number of children."""

RATES = (0.5, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""About how often the token of each rank is the next one. This orders the template."""


@functools.cache
def template() -> tuple[Path, ...]:
    """The 80 nodes, the most probable first. A parent comes before its children."""
    paths = [(*map(int, parent), rank) for parent, count in CHILDREN.items() for rank in range(count)]
    return tuple(sorted(paths, key=lambda path: (-_score(path), len(path), path)))


def _score(path: Path) -> float:
    return float(np.prod([RATES[rank] for rank in path]))


@dataclass(frozen=True, kw_only=True)
class Recycle:
    """Proposes a tree of the tokens that were last most probable after each token."""

    needs: ClassVar[frozenset[str]] = frozenset({f"top_ids:{WIDTH}"})
    trained: ClassVar[bool] = False

    def load(self, target: DraftTarget) -> LoadedRecycle:
        return LoadedRecycle(Table(target.vocab_size))


class Table:
    """For each token, the tokens that were last most probable after it. -1 where nothing is known.

    Attributes:
        top_ids: (vocab, 8) int32, in order of rank.
    """

    def __init__(self, vocab: int, width: int = WIDTH) -> None:
        self.top_ids = np.full((vocab, width), -1, dtype=np.int32)

    def learn(self, token_ids: Sequence[int], top_ids: IntArray) -> None:
        """Store the tokens that may follow each of `token_ids`. If a token occurs twice, its last entry is kept.

        Args:
            top_ids: (n, 8), in order of rank.
        """
        for token, row in zip(token_ids, top_ids, strict=True):
            self.top_ids[token] = row

    def draft(self, root: int, paths: Sequence[Path]) -> Draft:
        """The nodes of `paths` (parents first) for which the table has a token."""
        nodes: dict[Path, int] = {(): 0}
        tokens, parents = [root], list[int]()
        for path in paths:
            parent_node = nodes.get(path[:-1])
            token = -1 if parent_node is None else int(self.top_ids[tokens[parent_node], path[-1]])
            if parent_node is not None and token >= 0:
                nodes[path] = len(tokens)
                tokens.append(token)
                parents.append(parent_node)
        scores = tuple(_score(path) for path in nodes if path)
        return Draft(token_ids=tuple(tokens[1:]), parents=tuple(parents), path_scores=scores, source="recycle")


@dataclass
class LoadedRecycle(OneByOne["RecycleSession"]):
    """One table for all sequences, kept between requests. A private sequence gets its own table."""

    table: Table
    paths: Sequence[Path] = field(default_factory=template)

    def open(self, prompt: Prompt, *, private: bool = False) -> RecycleSession:
        table = Table(*self.table.top_ids.shape) if private else self.table
        return RecycleSession(table, self.paths)


class RecycleSession:
    """The newest token of one sequence, and the table that it reads and writes."""

    def __init__(self, table: Table, paths: Sequence[Path]) -> None:
        self._table, self._paths, self._root = table, paths, -1

    def observe(self, seen: Observation) -> None:
        self._root = seen.token_ids[-1]
        if seen.step_top_ids is not None:
            self._table.learn(seen.step_token_ids, seen.step_top_ids.cpu().numpy())

    def propose(self, budget: DraftBudget) -> Draft:
        paths = [path for path in self._paths if len(path) <= budget.max_depth]
        return self._table.draft(self._root, paths[: budget.max_tokens])
