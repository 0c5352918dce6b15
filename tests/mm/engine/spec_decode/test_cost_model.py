"""What is known of the time that passes take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mm.engine.spec_decode.cost_model import WARM_S, CostModel
from tests.helpers.speculating import times_of


def test_times_between_what_was_measured():
    times = times_of({1: 1.0, 5: 4.0, 9: 3.0})
    assert times.seconds(1, np.array([0, 2, 4, 8])).tolist() == pytest.approx([1.0, 2.5, 4.0, 4.0])
    assert times.seconds(1, np.array([16]))[0] == pytest.approx(4.0 + 16 - 9), (
        "beyond, a row adds what it adds to a chunk"
    )
    for _ in range(9):
        times.observe(1, 4, 2.0)
    assert times.seconds(1, np.array([4])).tolist() == pytest.approx([2.0])


def test_rows_that_nobody_verified_cost_what_rows_of_a_chunk_cost_and_what_is_known_to_be_wrong_with_that():
    times = CostModel()
    times.calibrate(lambda rows: 1.0 + rows, 64)
    assert times.plain(4) == pytest.approx(5.0)
    assert times.seconds(4, np.array([0, 8])).tolist() == pytest.approx([5.0, 13.0])
    times.observe(4, 0, 10.0)
    times.observe(4, 8, 10.0 + 16.0)
    assert times.seconds(4, np.array([0, 8, 24])).tolist() == pytest.approx([10.0, 26.0, 42.0])
    assert times.plain(8) == pytest.approx(18.0), "twice what the chunk of four took, and so with eight"
    times.observe(8, 0, 14.0)
    assert times.plain(6) == pytest.approx(12.0)


def test_what_was_summed_up_does_not_stay_when_times_change():
    times = times_of({1: 1.0, 9: 9.0})
    times.observe(4, 0, 4.0)
    assert times.plain(6) == pytest.approx(6.0)
    assert times.table(4)[8] == pytest.approx(12.0)
    for _ in range(40):
        times.observe(4, 0, 40.0)
        times.observe(4, 8, 48.0)
    assert times.plain(6) == pytest.approx(60.0)
    assert times.table(4)[8] == pytest.approx(48.0)


def test_a_drafted_row_costs_what_it_costs_at_that_batch_size():
    times = times_of({1: 1.0, 2: 1.1})
    times.observe(16, 0, 4.0)
    times.observe(16, 1, 6.0)
    assert times.seconds(1, np.array([1]))[0] == pytest.approx(1.1)
    assert times.seconds(16, np.array([1]))[0] == pytest.approx(6.0)


def test_a_pass_that_something_held_up_does_not_make_its_size_dear():
    """On a busy machine a pass may take many times as long, two of three times even."""
    times, hindrance = CostModel(), itertools.cycle((0.0, 30.0, 40.0))
    times.calibrate(lambda rows: 1.0 + 0.1 * rows + next(hindrance), 16)
    assert times.seconds(1, np.array([0, 3])).tolist() == pytest.approx([1.1, 1.4])


def test_every_number_of_rows_has_had_its_first_pass_before_one_is_measured():
    asked: list[int] = []

    def run(rows: int) -> float:
        asked.append(rows)
        return 0.001 if rows in asked[:-1] else 0.01

    times = CostModel()
    times.calibrate(run, 40)
    assert set(asked) == set(range(1, 41))
    assert times.plain(1) == pytest.approx(0.001)
    assert times.plain(40) == pytest.approx(0.001)


def test_a_large_model_is_not_warmed_for_long():
    asked: list[int] = []

    def run(rows: int) -> float:
        asked.append(rows)
        return WARM_S / 3

    CostModel().calibrate(run, 64)
    assert not {5, 7, 50} & set(asked)
