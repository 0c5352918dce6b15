"""The OpenAPI document of a server says what this server takes: each request is taken or refused by both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from serve.api.document_limits import address_pattern, up_to
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime

PICTURE = "data:image/png;base64,iVBORw0KGgo="
TOOL = {"type": "function", "function": {"name": "look"}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
SEEN = [{"role": "user", "content": [{"type": "image_url", "image_url": PICTURE}]}]
CHAT = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": "tiny", "max_tokens": 2, "prompt": "Hello"}
RESPONSE = {"model": "tiny", "max_output_tokens": 2, "input": "Hello"}

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | {"logit_bias": {"1023": 1}, "stop": "x", "stop_token_ids": [0]}),
    ("/v1/chat/completions", CHAT | {"response_format": FORM, "top_logprobs": 0, "chat_template_kwargs": {"a": 1}}),
    ("/v1/chat/completions", CHAT | {"structured_outputs": {"json_object": True}, "ignore_eos": False}),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2, "logprobs": True, "tool_choice": "none"}),
    (
        "/v1/chat/completions",
        CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ),
    ("/v1/chat/completions", CHAT | {"vision": {"reducer": "divprune:keep_ratio=0.5", "fps": 2, "num_frames": None}}),
    ("/v1/chat/completions", CHAT | {"mm_processor_kwargs": {"num_frames": 2}, "speculation": {"drafter": "none"}}),
    ("/v1/completions", TEXT | {"prompt": [499, 0]}),
    ("/v1/responses", RESPONSE | {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}),
    ("/v1/responses", RESPONSE | {"text": {"verbosity": "medium"}}),
    ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    ("/detokenize", {"tokens": [1023]}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/v1/chat/completions", CHAT | wrong)
        for wrong in (
            {"logit_bias": {"x": 1}},
            {"logit_bias": {"1": 101}},
            {"stop": ""},
            {"stop": ["x" * 1001]},
            {"stop": ["x"] * 5},
            {"stop_token_ids": [-1]},
            {"structured_outputs": {}},
            {"structured_outputs": {"json": {}, "json_object": True}},
            {"response_format": {"type": "text", "schema": {}}},
            {"response_format": FORM, "guided_json": {"type": "object"}},
            {"response_format": FORM, "ignore_eos": True},
            {"top_logprobs": 2},
            {"tool_choice": "required"},
            {"chat_template_kwargs": {"messages": "x"}},
            {"chat_template_kwargs": {"_x": 1}},
            {"mm_processor_kwargs": {"max_pixels": 1}},
            {"vision": {"fps": 1, "num_frames": 1}},
            {"vision": {"reducer": "divprun"}},
            {"vision": {"num_frames": 10_000}},
            {"speculation": {"drafter": "other"}},
            {"n": 1000},
            {"min_tokens": 5000, "max_tokens": None},
            {"max_tokens": 5000},
            {"cache_salt": ""},
        )
    ),
    ("/v1/completions", TEXT | {"prompt": [1024]}),
    ("/v1/responses", RESPONSE | {"text": {"format": {"type": "json_schema", "json_schema": {}}}}),
    ("/v1/responses", RESPONSE | {"text": {"verbosity": "low"}}),
    ("/v1/responses", RESPONSE | {"top_logprobs": 2}),
    ("/tokenize", {"messages": SEEN}),
    ("/detokenize", {"tokens": [1024]}),
    ("/v1/embeddings", {"model": "tiny", "messages": CHAT["messages"]}),
    ("/v1/embeddings", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    ("/v1/embeddings", {"model": "tiny", "messages": SEEN, "vision": {"return_map": True}}),
    ("/v1/embeddings", {"model": "tiny", "messages": SEEN, "cache_salt": ""}),
    ("/load_model", {"model": "other"}),
]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from fastapi.testclient import TestClient

    config = ServeConfig()
    runtime = build_local_runtime(config)
    with TestClient(create_app(runtime, config), base_url="http://127.0.0.1") as client:
        yield client
    runtime.close()


def problem_of(client: Any, path: str, body: dict[str, Any]) -> str:
    """What the document has against a body."""
    document = client.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    checker = jsonschema.Draft202012Validator(schema | {"components": document["components"]})
    return next((error.message for error in checker.iter_errors(body)), "")


@pytest.mark.parametrize(("path", "body"), TAKEN, ids=str)
def test_what_the_document_allows_is_taken(client: Any, path: str, body: dict[str, Any]) -> None:
    assert problem_of(client, path, body) == ""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "body"), REFUSED, ids=str)
def test_what_the_server_refuses_the_document_excludes(client: Any, path: str, body: dict[str, Any]) -> None:
    assert (client.post(path, json=body)).status_code in (400, 404)
    assert problem_of(client, path, body)


@pytest.mark.parametrize("last", [0, 1, 9, 10, 99, 100, 101, 499, 1023, 2000, 9_999])
def test_numbers_up_to_a_limit(last: int) -> None:
    pattern = re.compile(up_to(last))
    assert [n for n in range(11_000) if pattern.fullmatch(str(n))] == list(range(last + 1))
    assert not pattern.fullmatch("00")
    assert not pattern.fullmatch("")


def test_addresses_of_media_are_those_that_the_operator_allows() -> None:
    def fits(address: str, *domains: str) -> bool:
        return re.fullmatch(address_pattern(domains), address) is not None

    assert fits(PICTURE[:-1] + "A")
    assert not fits("https://a.example/x.png")
    assert not fits("data:image/png")
    assert fits("https://a.example/x.png", "a.example")
    assert fits("http://a.example:80", "a.example")
    assert not fits("https://axexample/x.png", "a.example")
    assert not fits("https://b.example/a.example", "a.example")
    assert fits("https://b.example/x.png", "*")
    assert not fits("ftp://b.example/x.png", "*")
