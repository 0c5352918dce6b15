"""EAGLE-2's tree on a draft law by last token only, worked out by hand."""

import math

import numpy as np
import pytest

from mm.engine.spec_decode.drafters.eagle.tree import DynamicTree, ancestor_mask

LAW = {
    0: (0.05, 0.50, 0.30, 0.10, 0.05),
    1: (0.10, 0.05, 0.60, 0.20, 0.05),
    2: (0.40, 0.10, 0.05, 0.15, 0.30),
    3: (0.25, 0.25, 0.20, 0.20, 0.10),
    4: (0.10, 0.10, 0.10, 0.65, 0.05),
}


def children(token, width):
    best = sorted(range(5), key=lambda t: (-LAW[token][t], t))[:width]
    return best, [math.log(LAW[token][t]) for t in best]


def grown(width=2, levels=3):
    tree = DynamicTree(width)
    tree.begin(*children(0, width))
    for _ in range(levels - 1):
        found = [children(tree.token_ids[i], width) for i in tree.frontier]
        tree.extend([tokens for tokens, _ in found], [probs for _, probs in found])
    return tree


def test_the_pool():
    tree = grown()
    assert tree.token_ids == [1, 2, 2, 3, 0, 4, 0, 4, 1, 2]
    assert tree.parents == [-1, -1, 0, 0, 1, 1, 2, 2, 4, 4]
    assert tree.depths == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert np.exp(tree.scores) == pytest.approx([0.5, 0.3, 0.3, 0.1, 0.12, 0.09, 0.12, 0.09, 0.06, 0.036])


def test_the_best_six():
    tokens, parents, scores = grown().best(6)
    assert tokens == [1, 2, 2, 3, 0, 0]
    assert parents == [0, 0, 1, 1, 2, 3]
    assert 1 + sum(scores) == pytest.approx(2.44)
    mask = ancestor_mask([-1, *parents])
    rows = ["".join(str(int(bit)) for bit in row) for row in mask]
    assert rows == ["1000000", "1100000", "1010000", "1101000", "1100100", "1010010", "1101001"]


@pytest.mark.parametrize(("count", "expected"), [(3, 2.10), (4, 2.22), (5, 2.34), (8, 2.62), (10, 2.716)])
def test_expected_tokens(count, expected):
    assert 1 + sum(grown().best(count)[2]) == pytest.approx(expected)


def test_ties_go_to_the_shallower_one_so_parents_stay():
    tree = grown()
    assert tree.best(2)[0] == [1, 2]
    assert tree.best(4)[1] == [0, 0, 1, 2], "the fourth is the shallower of two with probability .12"
    sure = DynamicTree(2)
    sure.begin([5, 6], [0.0, -1e9])
    sure.extend([[7, 8], [7, 8]], [[0.0, -1e9], [0.0, -1e9]])
    for count in range(1, 6):
        _, parents, _ = sure.best(count)
        assert all(parent <= i for i, parent in enumerate(parents))


def test_width_one_is_a_chain():
    tokens, parents, _ = grown(width=1, levels=4).best(4)
    assert tokens == [1, 2, 0, 1]
    assert parents == [0, 1, 2, 3]


def test_struck_tokens_go_with_all_below_them():
    tree = grown()
    tree.strike({2})
    tokens, parents, _ = tree.best(10)
    assert 2 not in tokens
    assert tokens == [1, 3]
    assert parents == [0, 1]


def test_improbable_candidates_are_left_out():
    assert grown().best(10, least=0.11)[0] == [1, 2, 2, 0, 0]


def test_lineage_holds_all_ancestors():
    tree = grown()
    assert tree.lineage([6, 8]) == [0, 1, 2, 4, 6, 8]
