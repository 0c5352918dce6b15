"""The router as it serves against the router as it was trained, and its budget."""

from __future__ import annotations

import math

import pytest
import torch

import mm
from demos.train.train_router import group_index, num_open, route
from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption
from mm.models.checkpoint import find
from mm.plugins.apply import reduce_tokens
from mm.plugins.spec import bind, build_reducer, reducer_spec
from tests.helpers.learned import built
from tests.parity.test_generate import picture, png


@pytest.fixture(scope="module")
def projected():
    """The tokens of a picture, as the shipped model's projector gives them."""
    model = mm.load("tiny", dtype="float32", num_threads=1)
    request = mm.api.build_request("x", images=[png(picture(1, (224, 224)))])
    return mm.encode.pipeline.encode(request, model.encode_parts).items[0].tokens


@pytest.mark.parametrize("keep_ratio", [0.25, 0.3, 0.4, 0.5, 0.77, 1.0])
def test_serving_keeps_what_training_kept(projected, keep_ratio):
    reducer = bind(reducer_spec("router", keep_ratio), find("tiny")).plugin
    groups = projected.embeddings[group_index(16)]
    expected, places = route(projected.embeddings, reducer.network(groups).detach(), num_open(len(groups), keep_ratio))
    out = reduce_tokens(reducer, projected)
    assert out.indices.tolist() == places
    torch.testing.assert_close(out.embeddings, expected, rtol=1e-5, atol=1e-5)
    assert out.num_tokens == reducer.plan(256, projected.grid)


def test_a_threshold_opens_every_group_above_it(projected):
    reducer = bind(reducer_spec("router:threshold=0.5"), find("tiny")).plugin
    scores = reducer.network(projected.embeddings[group_index(16)])
    assert reduce_tokens(reducer, projected).num_tokens == 64 + 3 * int((scores > 0.5).sum())
    for threshold, kept in ((-1e9, 256), (1e9, 64)):
        assert reduce_tokens(built(f"router:threshold={threshold}", width=256), projected).num_tokens == kept


@pytest.mark.parametrize("side", [1, 2, 3, 5, 27])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.4, 0.9])
def test_grids_with_an_odd_side_stay_within_the_budget_and_one_token_per_group(side, keep_ratio):
    tokens = VisualTokens.full(torch.randn(side * side, 32), (1, side, side), "image")
    out = reduce_tokens(built("router", keep_ratio, width=32), tokens)
    num_groups = math.ceil(side / 2) ** 2
    assert num_groups <= out.num_tokens <= max(num_groups, keep_ratio * side * side)
    assert float(out.sizes.sum()) == side * side


def test_clips_stay_as_they_are():
    tokens = VisualTokens.full(torch.randn(32, 32), (2, 4, 4), "video")
    assert reduce_tokens(built("router", width=32), tokens).num_tokens == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router:keep_ratio=0.2", "it has to be .25 or more"),
        ("router:keep_ratio=0.5,threshold=1", "takes the place of keep_ratio"),
        ("router:threshold=high", "has to be a number from"),
    ],
)
def test_what_cannot_be_kept_is_refused(text, words):
    with pytest.raises(InvalidOption, match=words):
        build_reducer(text)
