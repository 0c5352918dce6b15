"""Intervals: seeded, over media, never without width."""

from __future__ import annotations

import numpy as np
import pytest

from serve.evaluation.intervals import Resamples


def test_two_runs_are_equal_and_other_cells_draw_otherwise():
    first, again, other = (Resamples(range(60), name).means(range(60)) for name in ("color", "color", "shape"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_interval_is_as_wide_as_theory_has_it():
    right = [i < 40 for i in range(100)]
    share = Resamples(range(100), "x").share(right)
    half = 1.96 * (0.4 * 0.6 / 100) ** 0.5
    assert share.value == 0.4
    assert share.low == pytest.approx(0.4 - half, abs=0.02)
    assert share.high == pytest.approx(0.4 + half, abs=0.02)


def test_questions_on_one_medium_count_as_one_draw():
    right = np.repeat([i < 10 for i in range(25)], 4)
    apart = Resamples(range(100), "x").share(right)
    together = Resamples(np.repeat(range(25), 4), "x").share(right)
    assert together.value == apart.value
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.15)


def test_a_share_of_one_or_zero_has_the_exact_bound():
    all_right, none_right = (Resamples(range(20), "x").share([value] * 20) for value in (True, False))
    assert (all_right.high, none_right.low) == (1.0, 0.0)
    assert all_right.low == pytest.approx(0.025 ** (1 / 20))
    assert none_right.high == pytest.approx(1 - all_right.low)


def test_a_difference_is_taken_pair_by_pair():
    """Both columns vary much, but one is the other with every fifth answer lost: the difference is known well."""
    one = [i % 2 == 0 for i in range(200)]
    other = [right and i % 10 != 0 for i, right in enumerate(one)]
    gap = Resamples(range(200), "x").difference(other, one)
    assert gap.value == pytest.approx(-0.1)
    assert -0.15 < gap.low < gap.high < -0.05
