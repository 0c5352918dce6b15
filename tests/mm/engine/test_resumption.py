"""A request that goes on at another engine gives the same events as one that was never interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mm
from mm.data.outputs import Delta
from mm.data.request import Emitted
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.errors import EngineError, InvalidRequest
from mm.plugins.spec import bind, reducer_spec
from tests.helpers.engines import KeepEverySecond, Question, Recorder, assert_idle, build, run_until

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["one", "two"]}, "b": {"type": "string", "maxLength": 8}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def model():
    return mm.load("tiny", dtype="float32")


@pytest.fixture
def engine(model):
    """The engine that goes on: nothing is cached there."""
    return build(model.engine.family, max_num_seqs=6, max_num_batched_tokens=32)


def question(model, reducer: Any = "none", **options: Any) -> Question:
    pixels = np.random.default_rng(3).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    plain: dict[str, Any] = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    request = mm.api.build_request("What is in the picture?", images=[pixels], **plain | options)
    found = reducer
    if isinstance(reducer, str):
        found = bind(reducer_spec(reducer), model.engine.family.folder, "cpu").plugin
    return Question(request=request, encoded=encode(request, model.encode_parts).items, reducer=found)


def deltas_of(engine: LLMEngine, asked: Question) -> Recorder:
    _, sink = asked.put_to(engine)
    run_until(engine, lambda: bool(sink.num_ends))
    if sink.error is not None:
        raise sink.error
    return sink


def shown(deltas: list[Delta], choice: int) -> list[tuple[Any, ...]]:
    """What clients see of the tokens of a choice."""
    return [
        (one.token_ids, one.text, one.finish_reason, [entry.token for entry in one.logprobs])
        for one in deltas
        if one.choice == choice
    ]


SAMPLED = {"temperature": 1.0, "seed": 11}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SAMPLED,
    "n = 3": SAMPLED | {"n": 3},
    "penalties": SAMPLED | {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "stop strings": SAMPLED | {"stop": ("e", "zz"), "min_tokens": 6, "ignore_eos": False},
    "schema": SAMPLED | {"response_format": FORMAT, "ignore_eos": False, "max_new_tokens": 60},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "in prefill": {"reducer": "fastv:keep_ratio=0.3"},
    "in prefill, n = 2": SAMPLED | {"reducer": "fastv:keep_ratio=0.3", "n": 2},
    "in the cache": {"reducer": KeepEverySecond()},
    "generated tokens": {"reducer": "dynamic:keep_ratio=0.5,text_keep_ratio=0.5"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_the_rest_is_what_would_have_come(model, engine, options, num_tokens):
    asked = question(model, **options)
    whole = deltas_of(build(model.engine.family, sharing=False, max_num_seqs=4), asked)
    n = asked.request.sampling.n
    firsts = [shown(whole.deltas, choice) for choice in range(n)]
    cuts = [max(0, min(num_tokens - choice, len(first) - 1)) for choice, first in enumerate(firsts)]
    emitted = tuple(
        Emitted(token_ids=tuple(token for ids, *_ in first[:cut] for token in ids))
        for first, cut in zip(firsts, cuts, strict=True)
    )
    rest = deltas_of(engine, replace(asked, request=replace(asked.request, emitted=emitted)))
    for choice in range(n):
        assert shown(rest.deltas, choice) == firsts[choice][cuts[choice] :]
    assert rest.summary is not None
    assert whole.summary is not None
    assert rest.summary.usage.num_completion_tokens == whole.summary.usage.num_completion_tokens
    assert rest.summary.usage.num_visual_tokens_kept == whole.summary.usage.num_visual_tokens_kept
    assert_idle(engine)


def test_choices_that_are_finished_stay_so(model, engine):
    asked = question(model, n=2, **SAMPLED)
    whole = deltas_of(build(model.engine.family, sharing=False, max_num_seqs=4), asked)
    tokens = whole.token_ids()
    emitted = (Emitted(token_ids=tuple(tokens[0]), is_finished=True), Emitted(token_ids=tuple(tokens[1][:3])))
    rest = deltas_of(engine, replace(asked, request=replace(asked.request, emitted=emitted)))
    assert rest.token_ids() == {1: tokens[1][3:]}
    assert rest.summary is not None
    assert rest.summary.usage.num_completion_tokens == 32


@pytest.mark.parametrize(
    ("emitted", "error"),
    [
        ((Emitted(), Emitted()), InvalidRequest),
        ((Emitted(token_ids=(5,), is_finished=True),), InvalidRequest),
        ((Emitted(token_ids=(5,) * 16),), EngineError),
    ],
)
def test_what_cannot_go_on_is_refused(model, engine, emitted, error):
    asked = question(model)
    with pytest.raises(error):
        replace(asked, request=replace(asked.request, emitted=emitted)).put_to(engine)
    assert_idle(engine)
