"""What was published about encode-prefill-decode disaggregation follows from the published curves."""

from __future__ import annotations

import pytest

from demos.bench.planning.published import (
    COLOCATED,
    DISTSERVE,
    EPD,
    PAPER_SHARDED,
    PAPER_SWITCH,
    PAPER_WHOLE,
    SHARED,
    WHOLE,
    longer_answers,
    ttft,
)


@pytest.mark.parametrize("pictures", [2, 4, 6, 8])
def test_time_to_first_token_and_what_sharding_gains(pictures):
    shared, whole = ttft(EPD, SHARED, pictures), ttft(EPD, WHOLE, pictures)
    assert shared == pytest.approx(PAPER_SHARDED[pictures], rel=0.1)
    assert whole == pytest.approx(PAPER_WHOLE[pictures], rel=0.05)
    assert whole / shared == pytest.approx(PAPER_WHOLE[pictures] / PAPER_SHARDED[pictures], rel=0.1)


@pytest.mark.parametrize("pictures", [2, 4, 6, 8])
def test_encoders_apart_are_first_and_the_others_alike(pictures):
    others = [ttft(DISTSERVE, WHOLE, pictures), ttft(COLOCATED, WHOLE, pictures)]
    assert ttft(EPD, SHARED, pictures) < 0.75 * min(others)
    assert max(others) < 1.02 * min(others)


def test_with_one_picture_nothing_is_gained():
    times = [ttft(EPD, SHARED, 1), ttft(DISTSERVE, WHOLE, 1), ttft(COLOCATED, WHOLE, 1)]
    assert max(times) < 1.01 * min(times)


def test_role_switching_when_answers_get_longer():
    still, switched = longer_answers(switching=False), longer_answers(switching=True)
    before, after = PAPER_SWITCH["latency"]
    assert still.e2e_s.mean() == pytest.approx(before, rel=0.05)
    assert switched.e2e_s.mean() == pytest.approx(after, rel=0.05)
    assert still.tpot_s.mean() / switched.tpot_s.mean() == pytest.approx(2.2, rel=0.1)
    assert 1 < switched.ttft_s.mean() / still.ttft_s.mean() < 1.6  # encoders were given away
    assert {(source, target) for _, source, target in switched.moves} == {("encode", "decode")}
