"""Token Recycling against a worked example: the tree, the walk, and what the table learns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from mm.engine.spec_decode.drafters.recycle import CHILDREN, LoadedRecycle, Table, template
from mm.engine.spec_decode.verifier import TreeVerification
from mm.plugins.drafter import DraftBudget, Observation
from tests.helpers.speculating import verify
from tests.mm.engine.spec_decode.drafters.test_copy import prompt_of

MEMORY = [[1, 2, 3], [2, 0, 4], [3, 1, 0], [4, 5, 1], [0, 5, 2], [5, 3, 0]]
PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
LOGITS = torch.tensor(
    [
        [9, 5, 0, 2, 4, 3],
        [2, 6, 5, 1, 0, 3],
        [0, 1, 2, 6, 5, 4],
        [3, 2, 1, 0, 9, 8],
        [1, 2, 9, 3, 4, 0],
        [0, 4, 3, 2, 1, 7],
        [5, 4, 3, 2, 1, 0],
        [0, 9, 1, 8, 2, 7],
        [7, 0, 6, 1, 5, 2],
    ]
)


def test_one_round():
    table = Table(6, 3)
    table.top_ids[:] = MEMORY
    loaded = LoadedRecycle(table, PATHS)
    session = loaded.open(prompt_of([1, 4]))
    session.observe(Observation(token_ids=(4,), is_prompt=True))
    draft = session.propose(DraftBudget(max_tokens=8, max_depth=3))
    assert (4, *draft.token_ids) == (4, 0, 5, 2, 1, 2, 5, 2, 0)
    assert draft.parents == (0, 0, 0, 1, 1, 2, 4, 4)
    walk, said = TreeVerification(draft), []

    def say(alive: list[int]) -> list[int | None]:
        said.append(int(LOGITS[walk.node].argmax()))
        return [said[-1]]

    verify([walk], say)
    assert walk.path == [0, 1, 4, 7]
    assert said == [0, 1, 2, 1]
    order = [row for row in range(9) if row not in walk.path] + walk.path
    tokens = (4, *draft.token_ids)
    session.observe(
        Observation(
            token_ids=tuple(said),
            step_token_ids=tuple(tokens[row] for row in order),
            step_top_ids=LOGITS[order].topk(3).indices,
        )
    )
    assert table.top_ids.tolist() == [[1, 2, 5], [2, 4, 3], [1, 3, 5], [4, 5, 1], [0, 1, 4], [0, 1, 2]]


def test_the_template():
    nodes = template()
    assert len(nodes) == len(set(nodes)) == sum(CHILDREN.values()) == 80
    assert Counter(map(len, nodes)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    for i, node in enumerate(nodes):
        assert node[:-1] in ((), *nodes[:i]), "a node stands before its parent"


def test_rows_never_seen_propose_nothing():
    session = LoadedRecycle(Table(6)).open(prompt_of([1]))
    session.observe(Observation(token_ids=(4,), is_prompt=True))
    assert session.propose(DraftBudget(max_tokens=8, max_depth=8)).num_tokens == 0


def test_budgets():
    table = Table(300)
    table.top_ids[:] = np.arange(8) + 1
    session = LoadedRecycle(table).open(prompt_of([1]))
    session.observe(Observation(token_ids=(4,), is_prompt=True))
    assert session.propose(DraftBudget(max_tokens=15, max_depth=2)).num_tokens == 15
    assert max(session.propose(DraftBudget(max_tokens=80, max_depth=2)).depths) == 2
    assert session.propose(DraftBudget(max_tokens=80, max_depth=9)).num_tokens == 80


def test_a_private_answer_leaves_nothing_behind():
    loaded = LoadedRecycle(Table(6, 3))
    for private in (True, False):
        session = loaded.open(prompt_of([1]), private=private)
        session.observe(Observation(token_ids=(4,), step_token_ids=(1,), step_top_ids=torch.tensor([[4, 3, 2]])))
        assert (loaded.table.top_ids[1].tolist() == [4, 3, 2]) is not private
