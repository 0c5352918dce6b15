"""DivPrune: cases D1, D1b and D2 of the reduction specification, and agreement with a plain version."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pruning.pre_llm.divprune as divprune
from mm.data.tokens import VisualTokens
from mm.plugins.apply import reduce_tokens
from mm.plugins.registry import create
from pruning.pre_llm.divprune import pick_order

D1 = [[4, 1, 0], [3, 2, 0], [0, 1, 3], [1, 4, 1], [0, 0, 5], [2, 2, 1], [5, 0, 1], [1, 0, 4]]
D1B = [[1, 0, 0], [2, 1, 0], [0, 1, 0], [0, 1, 2], [0, 0, 1], [1, 1, 1]]
D2 = [[1, 0], [1, 0], [0, 1], [0, 1]]


@pytest.fixture(params=["matrix", "rows"])
def _either_way(request, monkeypatch):
    """Both ways of getting similarities: all at once, and a row at a time as for very long inputs."""
    if request.param == "rows":
        monkeypatch.setattr(divprune, "MAX_MATRIX_TOKENS", 0)


def plain_pick_order(embeddings: np.ndarray, k: int) -> list[int]:
    """The rule of the paper, in float64 and word for word: every distance, every minimum, every step."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    distance = 1 - unit @ unit.T
    others = distance + np.diag(np.full(len(unit), np.inf))
    chosen = [int(np.argmax(others.min(axis=0)))]
    while len(chosen) < k:
        closest = distance[chosen].min(axis=0)
        closest[chosen] = -np.inf
        chosen.append(int(np.argmax(closest)))
    return chosen


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    ("rows", "order"), [(D1, [3, 4, 6, 1, 5, 2, 0, 7]), (D1, [3, 4, 6, 1]), (D1B, [2, 0, 4]), (D2, [0, 2, 1])]
)
def test_conformance_pick_order(rows, order):
    assert pick_order(torch.tensor(rows).float(), len(order)).tolist() == order


@pytest.mark.parametrize(
    ("rows", "keep_ratio", "kept"), [(D1, 0.5, [1, 3, 4, 6]), (D1B, 0.5, [0, 2, 4]), (D2, 0.75, [0, 1, 2])]
)
def test_conformance_kept(rows, keep_ratio, kept):
    tokens = VisualTokens.full(torch.tensor(rows).float(), (1, 1, len(rows)), "image")
    assert reduce_tokens(create("reducer", "divprune", keep_ratio=keep_ratio), tokens).indices.tolist() == kept


def test_each_crop_has_its_share_unless_all_are_chosen_from_at_once():
    """The second crop repeats one token: its share shows that, a joint choice takes at most one of the copies."""
    rows = torch.cat([torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.ones(12, 6)])
    tokens = VisualTokens.full(rows, (2, 3, 4), "image")
    apart = reduce_tokens(create("reducer", "divprune", keep_ratio=0.25), tokens).indices.tolist()
    assert apart == [*sorted(pick_order(rows[:12], 3).tolist()), 12, 13, 14]
    joint = reduce_tokens(create("reducer", "divprune", keep_ratio=0.25, joint=True), tokens).indices.tolist()
    assert joint == sorted(pick_order(rows, 6).tolist())
    assert sum(index >= 12 for index in joint) <= 1


def test_d1_nearest_neighbour_distances():
    unit, _ = divprune._unit_rows(torch.tensor(D1).float())
    expected = torch.tensor([0.0487, 0.0583, 0.0513, 0.1358, 0.0299, 0.0755, 0.0487, 0.0299])
    for rows in (divprune._Matrix(unit), divprune._Rows(unit)):
        assert torch.allclose(1 - rows.nearest_neighbour(), expected, atol=5e-4)


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    ("num_tokens", "width", "k"), [(2, 3, 1), (37, 5, 37), (256, 64, 64), (515, 16, 77), (777, 32, 40)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_plain_version(num_tokens, width, k, seed):
    rng = np.random.default_rng(seed)
    # Integers: float32 and float64 see the same input, and the gaps between distances stay above their rounding.
    embeddings = rng.integers(-50, 51, (num_tokens, width)).astype(np.float64)
    assert pick_order(torch.from_numpy(embeddings).float(), k).tolist() == plain_pick_order(embeddings, k)


@pytest.mark.usefixtures("_either_way")
def test_a_token_is_never_chosen_twice():
    for rows in (torch.ones(9, 4), torch.zeros(9, 4), torch.cat([torch.eye(3), torch.eye(3), torch.eye(3)])):
        assert sorted(pick_order(rows, 9).tolist()) == list(range(9))


@pytest.mark.usefixtures("_either_way")
def test_rows_that_are_not_finite_are_chosen_last():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    rows[2, 1], rows[5, 0] = float("nan"), float("inf")
    order = pick_order(rows, 8).tolist()
    assert set(order[6:]) == {2, 5}
    assert sorted(order) == list(range(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float32(dtype):
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(pick_order(rows, 30), pick_order(rows.float(), 30))
