"""What a request's times mean: queue, prefill and decode follow each other, and each token has its share of a step."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from mm.data.request import Request
from mm.data.tokens import Prompt
from mm.engine.output_processor import OutputProcessor
from mm.engine.sequence import EngineRequest
from mm.engine.spec_decode.verifier import TreeVerification
from mm.engine.stats import Counters
from mm.engine.step_result import StepResult
from mm.engine.summary import summarise
from tests.helpers.engines import Recorder


def request_at(arrival: float, scheduled: float, first_token: float) -> EngineRequest:
    prompt = Prompt(
        token_ids=torch.arange(4),
        embeddings=torch.zeros(4, 2),
        positions=torch.arange(4)[None],
        next_position=4,
        is_visual=torch.zeros(4, dtype=torch.bool),
    )
    request = EngineRequest(params=Request(request_id="a", messages=()), media=(), prompt=prompt, sink=Recorder())
    request.arrival_time, request.first_scheduled_time, request.first_token_time = arrival, scheduled, first_token
    return request


def test_each_second_of_a_request_is_in_one_stage():
    timings = summarise(request_at(1.0, 3.0, 7.0), now=17.0).timings
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == (2.0, 4.0, 10.0)


def observe(processor: OutputProcessor, seq: object, emitted: list[int], now: float) -> None:
    result = StepResult(seq, 0, 0, TreeVerification(), {})  # type: ignore[arg-type]
    result.emitted.extend(emitted)
    processor._finish_if_done(result, now)


@pytest.mark.parametrize("steps", [[1, 1, 1], [3], [1, 4, 2]])
def test_tokens_of_one_step_share_its_time(steps):
    """So the times between tokens add up to the time of decoding, however many a step gives."""
    counters = Counters()
    lifecycle = SimpleNamespace(is_live=lambda seq: True)
    processor = OutputProcessor(None, None, None, None, lifecycle, counters, None)  # type: ignore[arg-type]
    seq = SimpleNamespace(last_token_time=None, output=SimpleNamespace(finish_reason=None))
    observe(processor, seq, [7], 10.0)
    assert sum(counters.inter_token_s.counts) == 0, "the first token comes after nothing"
    for now, count in zip(itertools.count(11.5, 1.5), steps):
        observe(processor, seq, list(range(count)), now)
    assert sum(counters.inter_token_s.counts) == sum(steps)
    assert counters.inter_token_s.total == pytest.approx(1.5 * len(steps))
