"""Folds: disjoint in pictures, orders and ranks as they should be on made-up outcomes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from demos.bench import folds
from serve.evaluation.items import Item


@pytest.fixture
def pictures() -> list[Item]:
    base = Item(id="", task="", media=b"x", media_type="image/jpeg", media_index=0, question="?", answer="x")
    return [
        dataclasses.replace(base, id=f"{task}-{i}", task=task, media_index=7 * i)
        for i in range(60)
        for task in ("color", "read")
    ]


def test_no_picture_is_in_two_folds(pictures):
    fold = folds.folds_of(pictures)
    media = [{item.media_index for item, f in zip(pictures, fold, strict=True) if f == k} for k in range(3)]
    assert [len(m) for m in media] == [20, 20, 20]
    assert not media[0] & media[1] | media[1] & media[2] | media[0] & media[2]


def test_tasks_count_alike_however_many_questions_they_have(pictures):
    few = pictures[:20] + [item for item in pictures[20:] if item.task == "read"]
    right = np.array([item.task == "color" for item in few])
    assert folds.Scorer(few).score(right) == 0.5
    assert folds.Scorer(few).resampled(right).mean() == pytest.approx(0.5, abs=0.01)


def test_a_clear_order_is_stable_and_a_toss_up_is_not_told_apart(pictures):
    rng = np.random.default_rng(0)
    good, fair = rng.random(len(pictures)) < 0.9, rng.random(len(pictures)) < 0.5
    like_fair = fair.copy()
    fair[0], like_fair[0] = False, True  # in the first fold
    fair[2], like_fair[2] = True, False  # in the second
    scorer, fold = folds.Scorer(pictures), folds.folds_of(pictures)
    clear = folds.compare(0.1, {"fair": fair, "good": good}, scorer, fold)
    assert clear["order"] == ["good", "fair"]
    assert clear["same_order_in_all_folds"]
    assert clear["rank_correlation"] == pytest.approx([1.0, 1.0, 1.0])
    assert clear["resamples_with_this_order"] > 0.99
    close = folds.compare(0.1, {"fair": fair, "like": like_fair}, scorer, fold)
    assert not close["same_order_in_all_folds"]
    assert [pair["told_apart"] for pair in close["pairs"]] == [False]
    assert close["told_apart_hold_in_all_folds"]


def test_the_cost_of_reading_is_counted_on_reading_alone(pictures):
    none = np.ones(len(pictures), bool)
    random = np.array([item.task != "read" for item in pictures])
    cost = folds.reading_cost(pictures, none, random)
    assert (cost["items"], cost["loss"], cost["met"]) == (60, 1.0, True)
    assert not folds.reading_cost(pictures, none, none)["met"]


def test_ranks_share_ties():
    assert list(folds.ranks([0.1, 0.3, 0.3, 0.5])) == [0, 1.5, 1.5, 3]
    assert folds.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(folds.rank_correlation([1, 1, 1], [1, 2, 3]))


def test_all_registered_methods_with_a_budget_take_part():
    assert {"random", "uniform", "divprune"} <= set(folds.methods())
    assert not {"none", "pipeline"} & set(folds.methods())
