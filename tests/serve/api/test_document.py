"""The OpenAPI document says what is accepted, and whatever else comes is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mm.data.messages import ROLES, parse_messages
from mm.errors import InvalidRequest, MmError
from serve.api.document import ChatRequest, EmbeddingRequest, Messages
from serve.api.embeddings import parse_embedding
from serve.api.errors import error_response
from serve.api.json_text import parse_json
from serve.api.parse import parse_chat
from serve.config import ServeConfig

CONFIG = ServeConfig()
URL = "data:image/png;base64,AAAA"
TYPES = ["text", "image_url", "video_url", "input_audio", "", None, 1, ["text"], {"text": 1}, True]
ODD = [None, "", "x", 0, [], {}, {"url": ""}, {"url": URL}, {"url": 1}, {"url": URL, "detail": "low"}, URL, [URL]]
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES)},
    optional={name: st.sampled_from(ODD) for name in ("text", "image_url", "video_url", "other")},
)
CONTENTS = st.sampled_from(["x", "", None, 1, [], {}]) | st.lists(PARTS | st.sampled_from(ODD), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "User", None, ["user"], {}])}, optional={"content": CONTENTS}
    )
    | st.sampled_from(ODD[:5]),
    max_size=2,
)


def is_accepted(messages: Any) -> bool:
    try:
        parse_chat({"model": "tiny", "messages": messages}, "id", CONFIG)
    except InvalidRequest:
        return False
    return True


@given(MESSAGES)
@example([{"role": "system", "content": [{"type": "video_url", "text": None, "video_url": "x"}]}])
@example([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
def test_messages_are_read_as_the_document_says(messages: Any) -> None:
    try:
        TypeAdapter(Messages).validate_python(messages)
    except ValidationError:
        assert not is_accepted(messages)
    else:
        assert is_accepted(messages)
        assert parse_messages(messages)
        jsonschema.validate({"model": "tiny", "messages": messages}, ChatRequest.model_json_schema())


WRONG: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63), 2**64, 10**400, -(10**400), 1e308, 5e-324, -0.0),
    *("", "x", "x" * 100_000, "\x00", "\udcff", "1", "null", "\N{GRINNING FACE}" * 600),
    *([], [[]], [None], [{}], [1, "a"], ["x"] * 50, [["x"]], [True], [{"type": ["text"]}], [10**400]),
    *({}, {"a": 1}, {"": None}, {"type": []}, {"type": {}}, {"x" * 5000: {"y": []}}, {"0": 10**400}, {"1": "x"}),
]
for _depth in range(2):
    WRONG.append([WRONG[-1]] * 2)
DEEP: Any = []
for _depth in range(150):
    DEEP = [DEEP]
WRONG.append(DEEP)

FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
START: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}],
}
INNER: list[tuple[str | int, ...]] = [
    ("messages", 0),
    *(("messages", 0, name) for name in ("role", "content", "name", "tool_calls", "audio")),
    ("messages", 0, "content", 0),
    *(("messages", 0, "content", 0, name) for name in ("type", "text", "image_url", "video_url")),
    *(("messages", 0, "content", 0, "image_url", name) for name in ("url", "detail")),
    *(("response_format", *path) for path in (("type",), ("json_schema",), ("json_schema", "name"))),
    *(("response_format", "json_schema", name) for name in ("schema", "strict", "description", "other")),
    *(("response_format", "json_schema", "schema", name) for name in ("type", "multipleOf", "enum", "$ref")),
    *(("vision", name) for name in ("reducer", "keep_ratio", "num_frames", "fps", "positions", "return_map", "x")),
    *(("speculation", name) for name in ("drafter", "max_draft_tokens", "return_accepted", "x")),
    *(("stream_options", name) for name in ("include_usage", "continuous_usage_stats", "x")),
    *(("logit_bias", name) for name in ("1", "x", "")),
    *(("stop", 0), ("stop_token_ids", 0)),
]
TEMPLATES: dict[str, Any] = {
    "response_format": FORM,
    "vision": {},
    "speculation": {},
    "stream_options": {},
    "logit_bias": {},
    "stop": ["a"],
    "stop_token_ids": [1],
}


def with_value(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The minimal body with one value put in."""
    body = json.loads(json.dumps(START | {name: TEMPLATES[name] for name in (path[0],) if name in TEMPLATES}))
    place = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return body


def outcome_of(parse: Any, body: dict[str, Any]) -> Any:
    try:
        return parse(body, "id", CONFIG)
    except MmError as error:
        return error


@pytest.mark.parametrize(("parse", "model"), [(parse_chat, ChatRequest), (parse_embedding, EmbeddingRequest)])
def test_every_field_takes_every_wrong_value_without_a_fault_of_ours(parse: Any, model: Any) -> None:
    """No other error than ours, none that is the server's fault, and none that quotes much of what was sent."""
    paths = [(name,) for name in model.model_fields] + INNER
    for path, value in itertools.product(paths, WRONG):
        outcome = outcome_of(parse, with_value(path, value))
        if isinstance(outcome, MmError):
            answer = error_response(outcome)
            assert answer.status in (400, 404), (path, value, outcome)
            assert len(answer.content) < 2500, (path, len(answer.content))


@given(st.text(alphabet=st.characters(), max_size=20).map(lambda text: json.dumps({"model": text})))
def test_lone_surrogates_are_refused_in_any_spelling(text: str) -> None:
    has_surrogate = any("\ud800" <= letter <= "\udfff" for letter in json.loads(text)["model"])
    if has_surrogate:
        with pytest.raises(InvalidRequest):
            parse_json(text.encode())
    else:
        assert parse_json(text.encode()) == json.loads(text)
