"""What a request may ask of its answer: every field's limits, named when they are passed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mm.data.response_format import ResponseFormat
from mm.data.sampling_params import SamplingParams
from mm.errors import InvalidRequest

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.0}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {5: 100.5}}, "logit_bias"),
    ({"logit_bias": {-5: 1}}, "logit_bias"),
    ({"logit_bias": {5: None}}, "logit_bias"),
    ({"logit_bias": {5: 1, "5": 2}}, "logit_bias"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias"),
    ({"logit_bias": 5}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {"type": ["json_object"]}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": {1, 2}}}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[repr(fields)[:50] for fields, _ in REFUSED])
def test_what_cannot_be_used_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


def test_the_forms_that_callers_have_at_hand_mean_the_same():
    sampling = SamplingParams(stop="a", stop_token_ids=[5], logit_bias={"7": 1, 8: -2.5})  # type: ignore[arg-type]
    assert sampling == SamplingParams(stop=("a",), stop_token_ids=(5,), logit_bias=((7, 1.0), (8, -2.5)))
    assert SamplingParams(**dict.fromkeys(SamplingParams.__dataclass_fields__)) == SamplingParams()


def test_it_crosses_process_borders():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}, "strict": True}}
    sampling = SamplingParams(response_format=schema, logit_bias={7: 1})  # type: ignore[arg-type]
    assert sampling.response_format == ResponseFormat(kind="json_schema", schema='{"const":1}')
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert hash(sampling) == hash(SamplingParams(response_format=sampling.response_format, logit_bias=((7, 1.0),)))
