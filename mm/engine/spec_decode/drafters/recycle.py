"""Token Recycling: what the model once thought might follow a token is proposed as a tree.

Paper     Token Recycling (Luo et al., ACL 2025).
Reads     the largest logits of every verified row, the rejected ones too.
Rule      a table holds for each token the 8 that were last most probable behind it; a fixed template of 80 nodes in 6
          levels says which ranks are followed. Of the template a budget keeps the most probable nodes.
Cost      a look-up per node, and the largest logits of each row; 4 bytes * 8 * vocab for the table.
Differs   Rows never seen propose nothing, where the authors' table begins with token 0. A token that stands in the tree
          several times leaves what its last row on the accepted path thought. Siblings that a budget cuts are cut by
          rank, with measured rates. Samples with point verification, where the authors' code is greedy only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

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
"""The authors' template: path to how many children it has."""

RATES = (0.5, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""About how often the token of each rank is the next one. Orders the template; an engine measures what it is worth."""


@functools.cache
def template() -> tuple[Path, ...]:
    """The 80 nodes, the most probable first; a node always comes after its parent."""
    paths = [(*map(int, parent), rank) for parent, count in CHILDREN.items() for rank in range(count)]
    return tuple(sorted(paths, key=lambda path: (-_score(path), len(path), path)))


def _score(path: Path) -> float:
    return float(np.prod([RATES[rank] for rank in path]))


@dataclass(frozen=True, kw_only=True)
class Recycle:
    """Proposes a tree of what the model last thought might follow each token."""

    needs: ClassVar[frozenset[str]] = frozenset({f"top_ids:{WIDTH}"})
    trained: ClassVar[bool] = False

    def load(self, target: DraftTarget) -> LoadedRecycle:
        return LoadedRecycle(Table(target.vocab_size))


class Table:
    """For each token, which ones were last most probable behind it; -1 where nothing is known.

    Attributes:
        top_ids: (vocab, 8) int32, in order of rank.
    """

    def __init__(self, vocab: int, width: int = WIDTH) -> None:
        self.top_ids = np.full((vocab, width), -1, dtype=np.int32)

    def learn(self, token_ids: Sequence[int], top_ids: np.ndarray) -> None:
        """Row i of `top_ids` is what may follow `token_ids[i]`; of a token that occurs twice, the last one counts."""
        for token, row in zip(token_ids, top_ids, strict=True):
            self.top_ids[token] = row

    def draft(self, root: int, paths: Sequence[Path]) -> Draft:
        """The nodes of `paths` (parents first) that are known of."""
        rows: dict[Path, int] = {(): 0}
        tokens, parents = [root], []
        for path in paths:
            above = rows.get(path[:-1])
            token = -1 if above is None else int(self.top_ids[tokens[above], path[-1]])
            if above is not None and token >= 0:
                rows[path] = len(tokens)
                tokens.append(token)
                parents.append(above)
        scores = tuple(_score(path) for path in rows if path)
        return Draft(token_ids=tuple(tokens[1:]), parents=tuple(parents), path_scores=scores, source="recycle")


@dataclass
class LoadedRecycle(OneByOne):
    """One table for all answers, kept from one to the next; a private answer has its own."""

    table: Table
    paths: Sequence[Path] = field(default_factory=template)

    def open(self, prompt: Prompt, *, private: bool = False) -> RecycleSession:
        table = Table(*self.table.top_ids.shape) if private else self.table
        return RecycleSession(table, self.paths)


class RecycleSession:
    def __init__(self, table: Table, paths: Sequence[Path]) -> None:
        self._table, self._paths, self._root = table, paths, -1

    def observe(self, seen: Observation) -> None:
        self._root = seen.token_ids[-1]
        if seen.row_top_ids is not None:
            self._table.learn(seen.row_token_ids, seen.row_top_ids.cpu().numpy())

    def propose(self, budget: DraftBudget) -> Draft:
        paths = [path for path in self._paths if len(path) <= budget.max_depth]
        return self._table.draft(self._root, paths[: budget.max_tokens])
