"""Simulated time against exact small cases, against queueing theory, and the books of every run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serve.planning.accounting import BadBooks
from serve.planning.decoder import Decoder
from serve.planning.events import Device, Loop, Station
from serve.planning.layout import Layout, layouts
from serve.planning.policies import Policies, Switching
from serve.planning.simulate import simulate
from serve.planning.traffic import Shape, Traffic, random_traffic
from tests.helpers.planning import curves, fleet

ONE, EP, EPD = (
    Layout(split="none", decode=("gpu",)),
    Layout(split="ep", encode=("gpu",), decode=("gpu",)),
    Layout(split="epd", encode=("gpu",), prefill=("gpu",), decode=("gpu",)),
)


def traffic(*arrivals: float, pictures: int = 1, text: int = 100, output: int = 3) -> Traffic:
    """Requests of one shape at given times."""
    made = random_traffic(
        Shape(pictures=pictures, text_tokens=text, output_tokens=output),
        curves().picture,
        rate=1.0,
        num_requests=max(2, len(arrivals)),
    )
    return replace(made.part(0, len(arrivals)), arrival_s=np.array(arrivals))


def test_one_request_takes_the_sum_of_its_stages():
    changes = {
        "front_end": {"request_s": 0.5, "picture_s": 0.25, "prompt_token_s": 0.001},
        "hand_off": {"process": {"bytes": [0], "seconds": [0.003]}, "wire": {"bytes": [0, 100], "seconds": [0, 1.0]}},
        "visual_token_bytes": 2,
        "kv_token_bytes": 3,
    }
    asked = traffic(0.0, pictures=2, text=100, output=4)  # 300 prompt tokens, 200 of them visual
    alone = 0.5 + 2 * 0.25 + 300 * 0.001 + 2 * 0.1 + 300 * 1e-4
    for layout, before, after in ((ONE, 0.003, 0.0), (EP, 4.0, 0.0), (EPD, 4.0, 9.0)):
        outcome = simulate(layout, fleet(len(layout.gpus), **changes), asked)
        assert outcome.ttft_s == pytest.approx([alone + before])
        assert outcome.e2e_s == pytest.approx([alone + before + after + 3 * 0.02])


def test_requests_queue_first_come_first_served():
    outcome = simulate(EP, fleet(2), traffic(0.0, 0.0, 0.0, output=1), Policies(encode_workers=1))
    assert outcome.ttft_s == pytest.approx([0.12, 0.22, 0.32])


def test_two_computations_share_a_gpu_evenly():
    loop, ended = Loop(), {}
    device = Device(loop)
    device.start(1.0, lambda name: ended.update({name: loop.now}), "long")
    loop.at(0.5, lambda _: device.start(0.25, lambda name: ended.update({name: loop.now}), "short") and None, None)
    loop.run()
    assert ended == pytest.approx({"short": 1.0, "long": 1.25})
    assert device.busy_s == pytest.approx(device.work_s) == pytest.approx(1.25)


def test_a_device_with_two_lanes_runs_two_at_full_speed():
    loop, ended = Loop(), []
    device = Device(loop, lanes=2)
    for _ in range(4):
        device.start(1.0, lambda _: ended.append(loop.now), None)
    loop.run()
    assert ended == pytest.approx([2.0] * 4)


def test_waiting_times_are_those_of_queueing_theory():
    """One server with even service: the mean wait is load / (2 (1 - load)) services (Pollaczek and Khinchine)."""
    asked = random_traffic(
        Shape(pictures=1, text_tokens=1, output_tokens=1), curves().picture, rate=7.0, num_requests=20_000
    )
    quick = {"prefill": {"tokens": [0, 1], "cached": [0], "seconds": [[0], [0]]}}
    outcome = simulate(EP, fleet(2, **quick), asked, Policies(encode_workers=1, max_in_flight=10**9))
    wait = outcome.ttft_s.mean() - 0.1
    assert wait == pytest.approx(0.1 * 0.7 / (2 * 0.3), rel=0.06)


def test_sharding_takes_the_time_of_the_longest_part():
    layout = Layout(split="ep", encode=("gpu",) * 3, decode=("gpu",))
    asked = traffic(0.0, pictures=7, output=1)
    whole = simulate(layout, fleet(4), asked).ttft_s[0]
    shared = simulate(layout, fleet(4), asked, Policies(sharding=True)).ttft_s[0]
    assert (whole - 0.08, shared - 0.08) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("policies", [Policies(), Policies(sharding=True), Policies(routing="round_robin")])
def test_every_layout_answers_every_request(policies):
    asked = random_traffic(
        Shape(pictures=3, text_tokens=50, output_tokens=40),
        curves().picture,
        rate=6.0,
        num_requests=300,
        burstiness=0.3,
    )
    changes = {"engine": {"max_num_seqs": 8, "max_batch_tokens": 200, "kv_tokens": 1500}}
    changes["hand_off"] = {"wire": {"bytes": [0, 1000], "seconds": [0.001, 0.002]}}
    for layout in layouts(fleet(4), ("none", "ep", "epd", "pd")):
        outcome = simulate(layout, fleet(4, **changes), asked, policies)  # which checks its books
        assert outcome.num_refused == 0
        assert (outcome.ttft_s > 0.3 / 3 - 1e-9).all()
        assert (outcome.e2e_s >= outcome.ttft_s + 39 * 0.02 - 1e-9).all()


def test_what_does_not_fit_is_refused_and_counted():
    asked = traffic(*[0.0] * 10, output=5)
    outcome = simulate(ONE, fleet(1), asked, Policies(max_in_flight=4))
    assert outcome.num_refused == 6
    too_long = {"engine": {"max_num_seqs": 8, "max_batch_tokens": 200, "kv_tokens": 100}}
    assert simulate(ONE, fleet(1, **too_long), asked).num_refused == 10


def test_a_full_cache_preempts_and_computes_again():
    changes = {"engine": {"max_num_seqs": 8, "max_batch_tokens": 1000, "kv_tokens": 500}}
    asked = traffic(0.0, 0.0, pictures=0, text=200, output=150)
    outcome = simulate(ONE, fleet(1, **changes), asked)
    assert outcome.num_preemptions == 1
    plain = simulate(ONE, fleet(1), asked)
    assert plain.num_preemptions == 0
    assert outcome.e2e_s[1] > plain.e2e_s[1]


def test_replicas_switch_roles_when_a_queue_is_long():
    asked = random_traffic(
        Shape(pictures=1, text_tokens=10, output_tokens=400), curves().picture, rate=4.0, num_requests=200
    )
    layout = Layout(split="epd", encode=("gpu",) * 4, prefill=("gpu",), decode=("gpu",))
    still = simulate(layout, fleet(6), asked)
    switched = simulate(layout, fleet(6), asked, Policies(switching=Switching()))
    assert [(source, target) for _, source, target in switched.moves][:2] == [("encode", "decode")] * 2
    assert switched.moves[0][0] == 5.0
    assert np.nanmean(switched.e2e_s) < 0.6 * np.nanmean(still.e2e_s)


def _loses_one(monkeypatch):
    def one_is_lost(station, work, done, argument):
        station.num_in += 1

    monkeypatch.setattr(Station, "put", one_is_lost)


def _forgets_seconds(monkeypatch):
    advance = Device._advance

    def forgets(device):
        advance(device)
        device.busy_s *= 0.9

    monkeypatch.setattr(Device, "_advance", forgets)


def _invents_tokens(monkeypatch):
    after = Decoder._after_steps

    def invents(decoder, steps):
        decoder.num_tokens += steps
        return after(decoder, steps)

    monkeypatch.setattr(Decoder, "_after_steps", invents)


@pytest.mark.parametrize(
    ("fault", "named"),
    [(_loses_one, "requests"), (_forgets_seconds, "busy seconds"), (_invents_tokens, "output tokens")],
)
def test_wrong_books_are_no_result(monkeypatch, fault, named):
    fault(monkeypatch)
    with pytest.raises(BadBooks, match=named):
        simulate(EP, fleet(2), traffic(*[0.0] * 5, output=4))
