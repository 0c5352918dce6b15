"""Estimates of step times."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mm.engine.spec_decode.cost_model import WARM_UP_S, CostModel
from tests.helpers.speculating import cost_model_of


def test_times_are_interpolated_between_measurements():
    costs = cost_model_of({1: 1.0, 5: 4.0, 9: 3.0})
    assert costs.step_s(1, np.array([0, 2, 4, 8])).tolist() == pytest.approx([1.0, 2.5, 4.0, 4.0])
    assert costs.step_s(1, np.array([16]))[0] == pytest.approx(4.0 + 16 - 9), (
        "after the last measurement a token adds what it adds to a chunk"
    )
    for _ in range(9):
        costs.record(1, 4, 2.0)
    assert costs.step_s(1, np.array([4])).tolist() == pytest.approx([2.0])


def test_unmeasured_numbers_of_tokens_follow_the_times_of_a_chunk():
    costs = CostModel()
    costs.calibrate(lambda num_tokens: 1.0 + num_tokens, 64)
    assert costs.decode_s(4) == pytest.approx(5.0)
    assert costs.step_s(4, np.array([0, 8])).tolist() == pytest.approx([5.0, 13.0])
    costs.record(4, 0, 10.0)
    costs.record(4, 8, 10.0 + 16.0)
    assert costs.step_s(4, np.array([0, 8, 24])).tolist() == pytest.approx([10.0, 26.0, 42.0])
    assert costs.decode_s(8) == pytest.approx(18.0), "four took twice as long as their chunk, so eight do too"
    costs.record(8, 0, 14.0)
    assert costs.decode_s(6) == pytest.approx(12.0)


def test_cached_estimates_follow_when_times_change():
    costs = cost_model_of({1: 1.0, 9: 9.0})
    costs.record(4, 0, 4.0)
    assert costs.decode_s(6) == pytest.approx(6.0)
    assert costs.step_table(4)[8] == pytest.approx(12.0)
    for _ in range(40):
        costs.record(4, 0, 40.0)
        costs.record(4, 8, 48.0)
    assert costs.decode_s(6) == pytest.approx(60.0)
    assert costs.step_table(4)[8] == pytest.approx(48.0)


def test_a_draft_token_costs_what_was_measured_at_its_batch_size():
    costs = cost_model_of({1: 1.0, 2: 1.1})
    costs.record(16, 0, 4.0)
    costs.record(16, 1, 6.0)
    assert costs.step_s(1, np.array([1]))[0] == pytest.approx(1.1)
    assert costs.step_s(16, np.array([1]))[0] == pytest.approx(6.0)


def test_calibration_ignores_steps_that_other_load_made_slow():
    """On a busy machine a step may take many times as long, even two of three steps."""
    costs, delay = CostModel(), itertools.cycle((0.0, 30.0, 40.0))
    costs.calibrate(lambda num_tokens: 1.0 + 0.1 * num_tokens + next(delay), 16)
    assert costs.step_s(1, np.array([0, 3])).tolist() == pytest.approx([1.1, 1.4])


def test_each_number_of_tokens_is_warmed_up_before_one_is_measured():
    counts: list[int] = []

    def run(num_tokens: int) -> float:
        counts.append(num_tokens)
        return 0.001 if num_tokens in counts[:-1] else 0.01

    costs = CostModel()
    costs.calibrate(run, 40)
    assert set(counts) == set(range(1, 41))
    assert costs.decode_s(1) == pytest.approx(0.001)
    assert costs.decode_s(40) == pytest.approx(0.001)


def test_the_warm_up_of_a_large_model_is_short():
    counts: list[int] = []

    def run(num_tokens: int) -> float:
        counts.append(num_tokens)
        return WARM_UP_S / 3

    CostModel().calibrate(run, 64)
    assert not {5, 7, 50} & set(counts)
