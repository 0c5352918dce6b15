"""Methods that rank by the last row's attention, on small cases worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mm.errors import InvalidOption
from mm.plugins.spec import build_reducer, reducer_spec
from pruning.base import budget
from pruning.helpers.ranking import scaled, spread
from pruning.in_llm.fastv import FastV
from pruning.in_llm.pyramiddrop import PyramidDrop
from pruning.in_llm.scheduled import Scheduled


@dataclass(kw_only=True)
class View:
    """One prompt whose last row attends to `scores`; head by head where there are several rows of them."""

    scores: torch.Tensor
    visual: torch.Tensor
    layer: int = 2
    num_layers: int = 32
    num_rows: int = 20
    items: torch.Tensor | None = None
    item_sizes: tuple[int, ...] = ()
    protected: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_visual = len(self.visual)
        self.items = torch.zeros(num_visual, dtype=torch.int64) if self.items is None else self.items
        self.item_sizes = self.item_sizes or (num_visual,)
        self.protected = torch.zeros(num_visual, dtype=torch.bool) if self.protected is None else self.protected

    def attention_rows(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        assert rows.tolist() == [self.num_rows - 1]
        return self.scores.reshape(-1, 1, self.scores.shape[-1])


def test_fastv_takes_what_the_last_row_likes_best():
    heads = torch.tensor([[30, 5, 10, 3, 9, 6, 12, 5, 20], [40, 5, 2, 15, 7, 4, 8, 9, 10]]) / 100
    view = View(scores=heads[:, 2:7], visual=torch.arange(2, 7))
    assert FastV(keep_ratio=0.5).in_prefill(2, view).tolist() == [1, 4]


@pytest.mark.parametrize(("num_tokens", "dropped", "kept"), [(576, 0.778, 128), (577, 0.5, 288), (7, 0.5, 4)])
def test_fastv_rounds_to_the_even_neighbour(num_tokens, dropped, kept):
    assert budget(num_tokens, round(1 - dropped, 3), "half_even") == kept


def test_pyramiddrop_counts_from_the_original_number():
    scores = torch.tensor([4.0, 9, 1, 7, 3, 8, 2])
    reducer = PyramidDrop(at_layers=(8, 16, 24))
    first = reducer.in_prefill(8, View(scores=scores, visual=torch.arange(7)))
    assert first.tolist() == [1, 3, 5]
    left = View(scores=torch.tensor([2.0, 1, 5]), visual=first, item_sizes=(7,))
    second = reducer.in_prefill(16, left)
    assert first[second].tolist() == [5]
    third = reducer.in_prefill(24, View(scores=torch.tensor([5.0]), visual=torch.tensor([5]), item_sizes=(7,)))
    assert third.tolist() == [0]


def test_pyramiddrop_s_ratios_fall_in_equal_steps():
    assert [PyramidDrop().ratio(stage) for stage in (1, 2, 3)] == [0.5, 0.25, 0.125]
    assert [budget(576, PyramidDrop().ratio(stage), "floor") for stage in (1, 2, 3)] == [288, 144, 72]
    assert [PyramidDrop(keep_ratio=0.09, num_stages=2).ratio(stage) for stage in (1, 2)] == [0.3, 0.09]


def test_pyramiddrop_s_items_have_quotas_of_their_own():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.8, 0.7, 0.6])
    view = View(
        scores=scores,
        visual=torch.tensor([2, 3, 4, 5, 9, 10, 11, 12]),
        items=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        item_sizes=(4, 4),
    )
    assert PyramidDrop(at_layers=(8, 16, 24)).in_prefill(8, view).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("reducer", [FastV(keep_ratio=0.25), PyramidDrop(at_layers=(8, 16, 24))])
def test_protected_tokens_come_first(reducer):
    protected = torch.tensor([False, True, False, False, False, False, False, False])
    scores = torch.tensor([0.3, 0.0, 0.1, 0.2, 0.05, 0.06, 0.07, 0.08])
    view = View(scores=scores, visual=torch.arange(8), protected=protected)
    last = 24 if isinstance(reducer, PyramidDrop) else 2
    kept = reducer.in_prefill(last, view).tolist()
    assert 1 in kept
    assert kept == ([1] if last == 24 else [0, 1])


def test_where_stages_lie():
    assert spread("a", "b", 3, 32) == (8, 16, 24)
    assert spread("a", "b", 3, 4) == (1, 2, 3)
    assert scaled((3, 7, 11, 15), 28, 32) == (3, 6, 10, 13)
    with pytest.raises(InvalidOption, match=r"num_stages' is 3, .*has 3 layers; give num_stages=2 or fewer"):
        PyramidDrop().layers(3)
    assert PyramidDrop(num_stages=2).layers(3) == (1, 2)
    with pytest.raises(InvalidOption, match="cannot drop tokens between layers"):
        PyramidDrop(num_stages=1).layers(1)


@pytest.mark.parametrize("reducer", [FastV(keep_ratio=0.5), Scheduled(keep_ratios=(0.5,), at_layers=(2,))])
def test_each_item_keeps_its_share(reducer):
    """All of one picture scores below all of the other: jointly ranked, it would be gone."""
    scores, items = torch.cat([torch.arange(6.0), 10 + torch.arange(6.0)]), torch.arange(12) // 6
    view = View(scores=scores, visual=torch.arange(12), items=items, item_sizes=(6, 6))
    assert reducer.in_prefill(2, view).tolist() == [3, 4, 5, 9, 10, 11]
    assert replace(reducer, joint=True).in_prefill(2, view).tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("layers", ["[2,2]", "[0,1,2]", "[3,2,1]", "7", "[1,2]", "[1.5,2,3]"])
def test_layers_that_cannot_be_are_refused(layers):
    with pytest.raises(InvalidOption, match="at_layers"):
        build_reducer(f"pyramiddrop:at_layers={layers}")


def test_a_list_survives_being_written():
    spec = reducer_spec("pyramiddrop:at_layers=[2,4],num_stages=2,keep_ratio=0.25")
    assert spec.plugin == PyramidDrop(at_layers=(2, 4), num_stages=2, keep_ratio=0.25)
    assert build_reducer(spec.canonical) == spec.plugin
    assert build_reducer(reducer_spec("uniform + pyramiddrop").canonical).stages[1] == PyramidDrop()
