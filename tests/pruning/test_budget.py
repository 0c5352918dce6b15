"""Token budgets: case KC of the reduction specification, and bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.base import budget, top_k_ascending

KEEP_COUNTS = [
    ("half_even", 576, 0.098, 56),
    ("half_even", 576, 0.1, 58),
    ("half_even", 2880, 0.098, 282),
    ("half_even", 5, 0.5, 2),
    ("half_even", 7, 0.5, 4),
    ("half_even", 576, 0.111, 64),
    ("half_up", 5, 0.5, 3),
    ("half_up", 7, 0.5, 4),
    ("half_up", 100, 0.07, 7),
    ("floor", 7, 0.5, 3),
    ("floor", 7, 0.25, 1),
    ("floor", 7, 0.125, 1),  # 0 of the rule, lifted to 1
    ("floor", 576, 0.5, 288),
    ("floor", 576, 0.25, 144),
    ("floor", 576, 0.125, 72),
    ("floor", 576, 0.2, 115),
    ("ceil", 576, 0.08, 47),
    ("ceil", 400, 0.08, 32),
    ("ceil", 10, 0.08, 1),
    ("ceil", 100, 0.07, 7),  # 100 * 0.07 is 7.000000000000001 in binary
]


@pytest.mark.parametrize(("rounding", "num_tokens", "keep_ratio", "expected"), KEEP_COUNTS)
def test_kc_keep_counts(rounding, num_tokens, keep_ratio, expected):
    assert budget(num_tokens, keep_ratio, rounding) == expected


@pytest.mark.parametrize(
    ("num_tokens", "prune_ratio", "exact", "as_floats"),
    [
        (100, "0.9", 10, 9),
        (1000, "0.9", 100, 99),
        (576, "0.9", 57, 57),
        (6272, "0.9", 627, 627),
        (1960, "0.75", 490, 490),
    ],
)
def test_kc_complement_is_exact_unless_floats_are_asked_for(num_tokens, prune_ratio, exact, as_floats):
    keep_ratio = float(1 - Fraction(prune_ratio))
    assert budget(num_tokens, keep_ratio, "floor_complement") == exact
    assert budget(num_tokens, keep_ratio, "floor_complement", compat=True) == as_floats


@given(
    st.integers(1, 5000),
    st.fractions(min_value="1/1000", max_value=1),
    st.sampled_from(["half_up", "half_even", "floor", "floor_complement", "ceil"]),
)
def test_budget_is_within_bounds_and_near_the_ratio(num_tokens, keep_ratio, rounding):
    kept = budget(num_tokens, keep_ratio, rounding)
    assert 1 <= kept <= num_tokens
    assert abs(kept - num_tokens * keep_ratio) <= 1 or kept == 1
    assert budget(num_tokens, 1.0, rounding) == num_tokens


def test_nothing_is_kept_of_nothing():
    assert budget(0, 0.5) == 0


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.0001])
def test_ratios_outside_the_range_are_refused(keep_ratio):
    with pytest.raises(ValueError, match="keep_ratio"):
        budget(10, keep_ratio)
    with pytest.raises(ValueError, match="negative"):
        budget(-1, 0.5)


def test_top_k_takes_the_lowest_index_of_equals_and_nan_last():
    assert top_k_ascending(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert top_k_ascending(torch.ones(500), 7).tolist() == list(range(7))
    scores = torch.tensor([float("nan"), -5.0, float("inf"), 3.0, float("-inf")])
    assert top_k_ascending(scores, 2).tolist() == [1, 3]
    assert top_k_ascending(scores, 4).tolist() == [0, 1, 2, 3]
