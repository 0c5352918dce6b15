"""What a body means, as properties: any accepted value arrives as it was, and nothing but our own errors comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model

from mm.data.sampling_params import SamplingParams
from mm.errors import InvalidRequest, RequestError
from mm.settings import setting
from serve.api.fields import json_fields
from serve.api.json_text import parse_json
from serve.api.parse import parse_chat
from serve.api.render import to_json
from serve.api.schema import IGNORED, NEUTRAL, ChatBody
from serve.config import ServeConfig

CONFIG = ServeConfig()
START = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*ChatBody.model_fields, *NEUTRAL, *IGNORED, "other"}))


def parse(**fields: object):
    return parse_chat(START | fields, "id", CONFIG)


def outcome_of(step: Callable[[], Any]) -> Any:
    """What it returns, or the error of ours that it raises."""
    try:
        return step()
    except RequestError as error:
        return error


@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_whatever_comes_is_a_call_or_an_error_of_ours(fields) -> None:
    outcome = outcome_of(lambda: parse_chat(START | fields, "id", CONFIG))
    if isinstance(outcome, RequestError):
        assert 0 < len(str(outcome)) < 1000
    else:
        assert outcome.model == "tiny"
        assert set(outcome.ignored) <= IGNORED


@given(JSON)
def test_any_value_as_a_body(value) -> None:
    with pytest.raises(RequestError):
        parse_chat(value, "id", CONFIG)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_body(raw) -> None:
    outcome = outcome_of(lambda: parse_json(raw))
    assert not isinstance(outcome, RequestError) or outcome.code == "invalid_json"


@given(JSON)
def test_json_comes_back_as_it_went(value) -> None:
    assert json.loads(to_json(value)) == value


@given(
    st.floats(0, 2),
    st.floats(0, 1, exclude_min=True),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 8),
    st.lists(st.text(min_size=1, max_size=9), max_size=4),
)
def test_sampling_arrives_as_it_was_sent(temperature, top_p, seed, n, stop) -> None:
    sampling = parse(temperature=temperature, top_p=top_p, seed=seed, n=n, stop=stop).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.n) == (temperature, top_p, seed, n)
    assert sampling.stop == tuple(stop)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_are_accepted_and_others_refused(name) -> None:
    for value in NEUTRAL[name]:
        assert parse(**{name: value}).ignored == ()
    with pytest.raises(InvalidRequest) as caught:
        parse(**{name: "something else"})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_no_field_is_of_two_kinds() -> None:
    assert not IGNORED & set(NEUTRAL)
    assert not (IGNORED | set(NEUTRAL)) & set(ChatBody.model_fields)


def test_long_values_are_not_quoted_back_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(temperature="x" * 100_000)
    assert len(str(caught.value)) < 300


def test_priority_and_salt_reach_the_request() -> None:
    request = parse(priority=-3, cache_salt="tenant").request
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert (parse().request.priority, parse().request.cache_salt) == (0, "")


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", 2**31), ("priority", -(2**31)), ("priority", 1.5), ("cache_salt", ""), ("cache_salt", "x" * 257)],
)
def test_priority_and_salt_are_bounded(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(**{field: value})
    assert refused.value.param == field


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a request as a dataclass declares them."""

    share: float | None = setting(None, above=0, max=1, help="A share.")
    ids: tuple[int, ...] = ()
    inner: str = setting("x", hidden=True, help="Not for clients.")


def test_a_declared_option_is_a_field_with_its_range_and_help() -> None:
    schema = create_model("Body", **json_fields(Options)).model_json_schema()["properties"]  # type: ignore[call-overload]
    assert set(schema) == {"share", "ids"}
    assert schema["share"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert schema["share"]["description"] == "A share."
    assert schema["ids"]["anyOf"][0] == {"type": "array", "items": {"type": "integer"}}


def test_every_sampling_option_is_a_field_of_the_body() -> None:
    options = {one.name for one in dataclasses.fields(SamplingParams)}
    assert options - {"max_new_tokens"} <= set(ChatBody.model_fields)
    assert parse(max_tokens=3).request.sampling.max_new_tokens == 3
    assert parse(max_tokens=3, max_completion_tokens=4).request.sampling.max_new_tokens == 4
