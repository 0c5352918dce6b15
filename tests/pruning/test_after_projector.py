"""Pool2, VisionZip (case V1), SCOPE (SC1) and CDPruner (C1, C1b): the specification's cases, and plain versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import reduce_tokens
from mm.plugins.features import ATTENTION_RECEIVED, TOWER_FEATURES, TOWER_KEYS
from mm.plugins.registry import create
from mm.plugins.spec import build_reducer
from pruning.base import top_k_ascending
from pruning.pre_llm import cdpruner, scope
from pruning.pre_llm.visionzip import contextual

ROWS = torch.tensor([[2.0, 0, 1], [1, 1, 0], [0, 2, 1], [0, 1, 2], [2, 1, 0]])


def line(embeddings: torch.Tensor, **aux_features: torch.Tensor) -> VisualTokens:
    return VisualTokens.full(embeddings, (1, 1, embeddings.shape[0]), "image", aux_features)


def test_pool2_is_the_mean_of_neighbours_and_of_what_a_border_leaves():
    grid = (2, 3, 5)
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    out = reduce_tokens(build_reducer("pool2"), VisualTokens.full(embeddings, grid, "video"))
    cells = embeddings.reshape(2, 3, 5, 4)
    expected = [cells[t, y : y + 2, x : x + 2].reshape(-1, 4) for t in (0, 1) for y in (0, 2) for x in (0, 2, 4)]
    assert torch.allclose(out.embeddings, torch.stack([block.mean(dim=0) for block in expected]), atol=1e-6)
    assert out.sizes.tolist() == [len(block) for block in expected]
    assert out.positions[:6].tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 2, 0], [0, 2, 2], [0, 2, 4]]


@pytest.mark.parametrize("spec", ["uniform + pool2", "pool2 + pool2", "visionzip + none + pool2"])
def test_pool2_behind_another_is_refused(spec):
    with pytest.raises(InvalidOption, match="pool2, which needs every cell of the grid, after"):
        build_reducer(spec)


V1_HIDDEN = torch.tensor([[9.0, 9], [1, 0], [2, 1], [0, 3], [4, 4], [5, 1], [1, 6], [3, 3], [2, 2]])
V1_KEYS = torch.tensor([[0.0, 0], [3, 1], [1, 0], [0, 2], [1, 3], [2, -1], [2, 0], [1, 2], [0, 1]])
V1_ROWS = torch.tensor([[8.0, 1, 20, 3, 6, 2, 30, 4, 26], [8, 3, 10, 5, 2, 4, 40, 6, 22]]) / 100


def test_v1_visionzip_chooses_and_assigns_as_the_authors_code():
    """Its tokens follow: [CLS], the dominant ones, then each target plus the mean of those that joined it."""
    dominant = top_k_ascending(V1_ROWS[:, 1:].sum(dim=0), 2)
    rest, targets, joins = contextual(V1_KEYS[1:], dominant, 2)
    assert dominant.tolist() == [5, 7]
    assert rest.tolist() == [0, 1, 2, 3, 4, 6]
    assert rest[targets].tolist() == [0, 3]
    assert dict(zip(rest.tolist(), rest[targets][joins].tolist(), strict=True)) == {0: 0, 1: 0, 4: 0, 2: 3, 3: 3, 6: 3}
    patches = V1_HIDDEN[1:]
    joined = [
        [i for i, j in zip(rest.tolist(), joins.tolist(), strict=True) if j == c and i not in (0, 3)] for c in (0, 1)
    ]
    contextual_tokens = [patches[t] + patches[m].mean(dim=0) for t, m in zip((0, 3), joined, strict=True)]
    output = torch.stack([V1_HIDDEN[0], *patches[dominant], *contextual_tokens])
    assert output.tolist() == [[9, 9], [1, 6], [2, 2], [4.5, 1], [5.5, 7]]


def test_v1_visionzip_here_takes_the_mean_at_the_target():
    aux_features = {ATTENTION_RECEIVED: V1_ROWS[:, 1:], TOWER_KEYS: V1_KEYS[1:].T}
    out = reduce_tokens(
        create("reducer", "visionzip", keep_ratio=0.5, contextual_ratio=0.5), line(V1_HIDDEN[1:], **aux_features)
    )
    assert out.indices.tolist() == [0, 3, 5, 7]
    assert out.sizes.tolist() == [3, 3, 1, 1]
    expected = [V1_HIDDEN[[1, 2, 5]].mean(dim=0).tolist(), V1_HIDDEN[[4, 3, 7]].mean(dim=0).tolist(), [1, 6], [2, 2]]
    assert torch.allclose(out.embeddings, torch.tensor(expected))


def test_v1_visionzip_as_the_authors_merge():
    """Target plus the mean of the others, as in `test_v1`; a target that none joined stays as it is; no NaN spreads."""
    aux_features = {ATTENTION_RECEIVED: V1_ROWS[:, 1:], TOWER_KEYS: V1_KEYS[1:].T}
    reducer = create("reducer", "visionzip", keep_ratio=0.5, contextual_ratio=0.5, merge="target_plus_mean")
    out = reduce_tokens(reducer, line(V1_HIDDEN[1:], **aux_features))
    assert out.indices.tolist() == [0, 3, 5, 7]
    assert torch.allclose(out.embeddings, torch.tensor([[4.5, 1], [5.5, 7], [1, 6], [2, 2]]))
    spoiled = V1_HIDDEN[1:].clone()
    spoiled[1] = torch.nan  # one of the two that join the first target
    out = reduce_tokens(reducer, line(spoiled, **aux_features))
    assert torch.allclose(out.embeddings[0], V1_HIDDEN[1] + V1_HIDDEN[5])
    with pytest.raises(InvalidOption, match="mean, target_plus_mean"):
        create("reducer", "visionzip", merge="sum")


@pytest.mark.parametrize(("keep_ratio", "num_tokens", "merged"), [(64 / 576, 576, 10), (0.01, 100, 0), (0.04, 100, 1)])
def test_visionzip_splits_its_budget(keep_ratio, num_tokens, merged):
    rng = torch.Generator().manual_seed(3)
    aux_features = {
        ATTENTION_RECEIVED: torch.rand(2, num_tokens, generator=rng),
        TOWER_KEYS: torch.randn(8, num_tokens, generator=rng),
    }
    out = reduce_tokens(
        create("reducer", "visionzip", keep_ratio=keep_ratio), line(torch.randn(num_tokens, 4), **aux_features)
    )
    assert (out.sizes > 1).sum() == merged
    assert out.sizes.sum() == num_tokens if merged else out.sizes.sum() == out.num_tokens


def test_sc1_scope():
    order, gains = scope.pick_order(ROWS, torch.tensor([1.0, 4, 2, 5, 3]), 3)
    assert order.tolist() == [1, 3, 4]
    assert torch.allclose(gains, torch.tensor([14.1193, 4.2566, 0.6566]), atol=5e-4)
    aux_features = {ATTENTION_RECEIVED: torch.tensor([[1.0, 4, 2, 5, 3]]), TOWER_FEATURES: ROWS.T}
    out = reduce_tokens(create("reducer", "scope", keep_ratio=0.6), line(torch.randn(5, 7), **aux_features))
    assert out.indices.tolist() == [1, 3, 4]


def plain_scope(features: np.ndarray, saliency: np.ndarray, k: int) -> list[int]:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity, covered, chosen = unit @ unit.T, np.zeros(len(features)), []
    while len(chosen) < k:
        gains = [sum(max(0, c - v) for c, v in zip(column, covered, strict=True)) for column in similarity.T]
        gains = np.array(gains) * saliency
        gains[chosen] = -1
        chosen.append(int(np.argmax(gains)))
        covered = np.maximum(covered, similarity[:, chosen[-1]])
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_scope_equals_the_plain_version(seed):
    rng = np.random.default_rng(seed)
    features, saliency = rng.integers(-9, 10, (40, 6)).astype(float), rng.integers(1, 50, 40).astype(float)
    order, _ = scope.pick_order(torch.from_numpy(features).float(), torch.from_numpy(saliency).float(), 15)
    assert order.tolist() == plain_scope(features, saliency, 15)


@pytest.mark.parametrize(
    ("weights", "order", "gains"),
    [([0.2, 1, 0.6, 0.9, 0.5], [1, 3, 2], [1, 0.729, 0.072]), ([1, 1, 1, 1, 1], [0, 2, 1], [1, 0.96, 0.3333])],
)
def test_c1_cdpruner(weights, order, gains):
    found, at = cdpruner.pick_order(ROWS, torch.tensor(weights).float(), 3)
    assert found.tolist() == order
    assert torch.allclose(at, torch.tensor(gains).float(), atol=5e-4)


def test_c1_the_greedy_choice_is_the_best_subset_of_three():
    weights = torch.tensor([0.2, 1, 0.6, 0.9, 0.5])
    unit = ROWS / ROWS.norm(dim=1, keepdim=True)
    kernel = weights[:, None] * (unit @ unit.T) * weights
    determinants = {tuple(s.tolist()): kernel[s][:, s].det() for s in torch.combinations(torch.arange(5), 3)}
    best = max(determinants, key=lambda subset: determinants[subset])
    assert best == (1, 2, 3)
    assert abs(determinants[best] - 0.0525) < 5e-4


def test_c1b_relevance_of_negated_cosines():
    weights = cdpruner.relevance(-torch.tensor([0.30, 0.10, 0.22, 0.14, 0.26]))
    assert torch.allclose(weights, torch.tensor([0, 1, 0.4, 0.8, 0.2]), atol=1e-5)
    order, gains = cdpruner.pick_order(ROWS, weights, 3)
    assert order.tolist() == [1, 3, 2]
    assert torch.allclose(gains, torch.tensor([1, 0.576, 0.032]), atol=5e-4)


def test_cdpruner_with_nothing_but_copies():
    order, _ = cdpruner.pick_order(ROWS[:1].expand(5, -1), torch.ones(5), 3)
    assert order.sort().values.tolist() == [0, 1, 2]
    copies = torch.cat([torch.eye(3), torch.eye(3)])
    order, _ = cdpruner.pick_order(copies, torch.tensor([0.5, 0.6, 0.7, 0.1, 0.2, 0.3]), 6)
    assert order.tolist() == [2, 1, 0, 5, 4, 3]  # what is left of nothing goes by relevance


def plain_dpp(embeddings: np.ndarray, weights: np.ndarray, k: int) -> list[int]:
    """Greedy maximum of the determinant, every determinant computed."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    kernel, chosen = weights[:, None] * (unit @ unit.T) * weights, []
    while len(chosen) < k:
        gains = [
            -1 if j in chosen else np.linalg.det(kernel[np.ix_([*chosen, j], [*chosen, j])]) for j in range(len(unit))
        ]
        chosen.append(int(np.argmax(gains)))
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_cdpruner_equals_the_plain_version(seed):
    rng = np.random.default_rng(seed)
    embeddings, weights = rng.integers(-9, 10, (40, 24)).astype(float), rng.integers(20, 100, 40) / 100
    order, _ = cdpruner.pick_order(torch.from_numpy(embeddings).float(), torch.from_numpy(weights).float(), 16)
    assert order.tolist() == plain_dpp(embeddings, weights, 16)


def test_cdpruner_prefers_what_the_question_is_about():
    """Four directions, two copies of each; the question names two of them."""
    embeddings = torch.eye(4).repeat_interleave(2, dim=0)
    tokens = line(embeddings)
    question = torch.tensor([[0, 3.0, 0, 1], [0, 1, 0, 3]])
    reducer = create("reducer", "cdpruner", keep_ratio=0.25)
    assert reduce_tokens(reducer, tokens, question).indices.tolist() == [2, 6]
    away = create("reducer", "cdpruner", keep_ratio=0.25, relevance_sign=-1)
    assert reduce_tokens(away, tokens, question).indices.tolist() == [0, 4]
    unasked = reduce_tokens(reducer, tokens, torch.empty(0, 4)).indices.tolist()
    assert unasked == [0, 2]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("visionzip", "contextual_ratio", 1.0),
        ("visionzip", "contextual_ratio", "half"),
        ("visionzip", "joint", 1),
        ("scope", "alpha", -1),
        ("scope", "alpha", float("inf")),
        ("cdpruner", "relevance_sign", 0),
        ("cdpruner", "relevance_sign", True),
    ],
)
def test_bad_options_are_refused(name, option, value):
    with pytest.raises(InvalidOption, match=option):
        create("reducer", name, **{option: value})
