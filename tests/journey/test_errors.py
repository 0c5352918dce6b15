"""Each error's status and body, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from mm.config import MediaLimits, ModelConfig
from mm.errors import CapacityError, ContextTooLong, MediaError, ReducerFault, SchemaNotFulfilled
from serve.runtime import Unavailable
from tests.journey.conftest import client_of


def error_of(response: Any) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return body["error"]


BAD_FIELDS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"n": 9}, "n", "invalid_request"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_request"),
    ({"stop": [""]}, "stop", "invalid_request"),
    ({"stop": [1]}, "stop.0", "invalid_value"),
    ({"messages": []}, "messages", "invalid_request"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_request"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type", None),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0].function",
        "invalid_request",
    ),
    ({"model": 5}, "model", "invalid_value"),
    ({"logprobs": 3}, "logprobs", "invalid_value"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_request"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "invalid_request"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_request"),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs", "unsupported_parameter"),
    ({"mm_processor_kwargs": {"max_pixels": 9}}, "mm_processor_kwargs.max_pixels", "unsupported_parameter"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "invalid_request"),
    ({"guided_regex": "a+"}, "guided_regex", "unsupported_parameter"),
    ({"response_format": "json"}, "response_format", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_request"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_request"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
        "invalid_request",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "invalid_request",
    ),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "invalid_request"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_request"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_request"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_request"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_value"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": -2.5}, "presence_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"min_p": 1.5}, "min_p", "invalid_value"),
    ({"mm_processor_kwargs": {"fps": 1}, "vision": {"fps": 2}}, "mm_processor_kwargs.fps", "invalid_request"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_request"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_request"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "unsupported_parameter"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"vision": {"reduser": "none"}}, "vision.reduser", "unknown_parameter"),
    ({"vision": {"keep_ratio": 0}}, "vision.keep_ratio", "invalid_value"),
    ({"vision": {"keep_ratio": 1.5}}, "vision.keep_ratio", "invalid_value"),
    ({"vision": "divprune"}, "vision", "invalid_value"),
    ({"vision": {"num_frames": 4, "fps": 2}}, "vision.fps", "invalid_request"),
    ({"vision": {"num_frames": 1000}}, "vision.num_frames", "invalid_request"),
    ({"vision": {"reducer": "divprunne"}}, "vision.reducer", "unknown_plugin"),
    ({"vision": {"reducer": "none", "keep_ratio": 0.5}}, "vision.keep_ratio", "invalid_plugin_option"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_FIELDS, ids=lambda x: json.dumps(x)[:40])
async def test_bad_fields_are_named(client, ask, fields, param, code) -> None:
    response = await client.post("/v1/chat/completions", json=ask() | fields)
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] == (code or "unsupported_content")


async def test_near_misses_are_suggested(client, ask) -> None:
    response = await client.post("/v1/chat/completions", json=ask(temprature=1))
    assert "did you mean 'temperature'?" in error_of(response)["message"]
    response = await client.post("/v1/chat/completions", json=ask(vision={"keep_ration": 1}))
    assert "did you mean 'keep_ratio'?" in error_of(response)["message"]


async def test_missing_fields_are_named(client) -> None:
    response = await client.post("/v1/chat/completions", json={"model": "tiny"})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")
    assert error_of(response)["code"] == "missing_parameter"


BODIES = {
    "empty": b"",
    "not json": b"{'model': 1}",
    "not utf-8": b'{"model": "\xff"}',
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "key twice": b'{"model": "a", "model": "b"}',
    "key twice, deeper": b'{"messages": [{"role": "a", "\\u0072ole": "b"}]}',
    "number beyond a float": b'{"temperature": 1e999}',
    "digits without end": b'{"seed": ' + b"9" * 5000 + b"}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "too many values": b'{"stop": [' + b"1," * 200_000 + b"1]}",
    "array": b"[]",
    "string": b'"x"',
    "trailing": b"{} {}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_bodies_that_are_no_json_object(client, body) -> None:
    response = await client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


async def test_error_that_quotes_a_name_is_still_valid_json(client, ask) -> None:
    response = await client.post("/v1/chat/completions", json=ask(model='a"\n\u2028✓'))
    assert response.status_code == 404
    assert 'a"' in error_of(response)["message"]


async def test_unknown_model(client, ask) -> None:
    response = await client.post("/v1/chat/completions", json=ask(model="gpt"))
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (404, "NotFoundError", "model_not_found")
    assert error["param"] == "model"
    assert (await client.get("/v1/models/gpt")).status_code == 404


@pytest.mark.parametrize("path", ["/nothing", "/model_info", "/server_info", "/v1/nothing", "/v1/models/"])
async def test_unknown_paths(client, path) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert error_of(response)["type"] == "NotFoundError"


async def test_wrong_method_names_the_right_one(client) -> None:
    response = await client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["code"] == "method_not_allowed"
    assert (await client.options("/v1/models")).status_code == 405


async def test_body_too_large_is_refused_by_its_header(make_client, ask) -> None:
    async with make_client(max_body_bytes=1000) as client:
        response = await client.post("/v1/chat/completions", json=ask("x" * 2000))
        assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")


async def test_body_too_large_is_refused_while_it_streams_in(make_client) -> None:
    sent, sent_before_answer = 0, []

    async def drip() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"x" * 100

    async with make_client(max_body_bytes=1000) as client:

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            async def watched_send(message: Any) -> None:
                sent_before_answer.append(sent)
                await send(message)

            await client.app(scope, receive, watched_send)

        async with client_of(watched) as watching:
            response = await watching.post("/v1/chat/completions", content=drip())
        assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")
        assert sent_before_answer[0] < 2000


async def test_media_errors_name_the_part(client, ask) -> None:
    content = [
        {"type": "text", "text": "x"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!!"}},
    ]
    response = await client.post("/v1/chat/completions", json=ask(content))
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == "messages[0].content[1].image_url"
    assert error["code"].startswith("media_")


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "x", "ftp://a/b"])
async def test_nothing_outside_the_request_is_read(client, ask, url) -> None:
    response = await client.post("/v1/chat/completions", json=ask([{"type": "image_url", "image_url": {"url": url}}]))
    assert response.status_code == 400
    assert error_of(response)["code"] in {"media_remote_disabled", "media_bad_source"}


async def test_too_many_items(make_client, ask, image_url) -> None:
    part = {"type": "image_url", "image_url": {"url": image_url}}
    async with make_client(model=ModelConfig(limits=MediaLimits(max_images=2))) as client:
        assert (await client.post("/v1/chat/completions", json=ask([part] * 2))).status_code == 200
        response = await client.post("/v1/chat/completions", json=ask([part] * 3))
        assert (response.status_code, error_of(response)["code"]) == (400, "media_too_many_items")


RAISED: list[tuple[Exception, int, str]] = [
    (ContextTooLong(5000, 10, 4096), 400, "context_length_exceeded"),
    (MediaError("undecodable", "image"), 400, "media_undecodable"),
    (CapacityError("no room", 7), 429, "overloaded"),
    (Unavailable("restarting", 5), 503, "unavailable"),
    (ReducerFault("Bad", "kept none"), 500, "reducer_fault"),
    (SchemaNotFulfilled("the answer has equal items"), 500, "schema_not_fulfilled"),
    (ValueError("secret at /home/x 0x7f001234567"), 500, "internal_error"),
]


@pytest.mark.parametrize(("raised", "status", "code"), RAISED, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", ["encode_error", "error"])
async def test_engine_errors_get_their_status_streaming_or_not(
    client, engine, ask, image_url, raised, status, code, stream, half
) -> None:
    setattr(engine, half, raised)
    content = [{"type": "image_url", "image_url": {"url": image_url}}]
    response = await client.post("/v1/chat/completions", json=ask(content, stream=stream))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert "secret" not in response.text
    assert "0x7f" not in response.text
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1


async def test_failures_are_logged_with_the_request_id(client, engine, ask, caplog) -> None:
    engine.error = ValueError("the reason")
    with caplog.at_level(logging.ERROR):
        await client.post("/v1/chat/completions", json=ask(), headers={"x-request-id": "req-77"})
    assert "req-77" in caplog.text
    assert "the reason" in caplog.text


async def test_failure_in_mid_stream_is_an_error_event_then_done(client, engine, ask) -> None:
    engine.error, engine.error_after = ValueError("boom"), 2
    response = await client.post("/v1/chat/completions", json=ask(stream=True))
    assert response.status_code == 200
    frames = [frame.removeprefix("data: ") for frame in response.text.strip().split("\n\n")]
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["error"]["code"] == "internal_error"
    assert "boom" not in response.text
    assert "red" in response.text


async def test_deadline_is_a_504(make_client, engine, ask) -> None:
    engine.delay_s = 0.2
    async with make_client(request_timeout_s=0.1) as client:
        response = await client.post("/v1/chat/completions", json=ask())
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")


async def test_more_requests_than_places_are_refused_with_a_hint(make_client, engine, ask) -> None:
    engine.delay_s = 0.05
    async with make_client(model=ModelConfig(max_num_seqs=1, max_waiting=1), max_queued_requests=0) as client:
        responses = await asyncio.gather(*(client.post("/v1/chat/completions", json=ask()) for _ in range(5)))
        statuses = sorted(response.status_code for response in responses)
        assert statuses == [200, 200, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert error_of(refused)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        assert (await client.post("/v1/chat/completions", json=ask())).status_code == 200


class TestKeys:
    @pytest.fixture
    async def locked(self, make_client):
        async with make_client(api_keys=("sesame", "second")) as client:
            yield client

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
    @pytest.mark.parametrize(
        "path", ["//v1/models", "/v1/%2e%2e/health", "/V1/models", "/health/", "/health/../v1/models", "/nothing"]
    )
    async def test_odd_paths_are_locked(self, locked, method, path) -> None:
        assert (await locked.request(method, path)).status_code == 401

    async def test_every_route_but_three_is_locked(self, locked) -> None:
        for route in locked.app.routes:
            for method in route.methods or ():
                response = await locked.request(method, route.path.replace("{model:path}", "tiny"))
                expected = (200,) if route.path in {"/", "/health", "/ping"} else (401,)
                assert response.status_code in expected, (method, route.path)

    @pytest.mark.parametrize("header", ["", "sesame", "Basic sesame", "Bearer", "Bearer wrong", "Bearer sesame2"])
    async def test_wrong_keys(self, locked, header) -> None:
        response = await locked.get("/v1/models", headers={"authorization": header} if header else {})
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"

    @pytest.mark.parametrize("key", ["sesame", "second"])
    async def test_right_keys(self, locked, key) -> None:
        assert (await locked.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200


class TestTenants:
    """What is cached is shared within a key, and a salt narrows that."""

    @staticmethod
    async def salt(client, engine, ask, key: str, **fields: Any) -> str:
        headers = {"authorization": f"Bearer {key}"}
        response = await client.post("/v1/chat/completions", json=ask(**fields), headers=headers)
        assert response.status_code == 200
        return engine.requests[-1].cache_salt

    async def test_keys_share_nothing(self, make_client, engine, ask) -> None:
        async with make_client(api_keys=("one", "two")) as client:
            found = [await self.salt(client, engine, ask, key) for key in ("one", "two", "one")]
            narrowed = [await self.salt(client, engine, ask, key, cache_salt="s") for key in ("one", "two")]
            assert found[0] == found[2]
            assert len({*found, *narrowed}) == 4
            assert all(found)
            pretended = await self.salt(client, engine, ask, "two", cache_salt=found[0])
            assert pretended not in found

    async def test_one_key_is_one_tenant(self, make_client, engine, ask) -> None:
        async with make_client(api_keys=("one",)) as client:
            assert await self.salt(client, engine, ask, "one") == ""
            assert await self.salt(client, engine, ask, "one", cache_salt="s") == "s"

    async def test_the_name_of_a_tenant_does_not_hold_its_key(self, make_client, engine, ask) -> None:
        async with make_client(api_keys=("sesame", "second")) as client:
            assert "sesame" not in await self.salt(client, engine, ask, "sesame")


async def test_pages_that_are_allowed_may_read_answers(make_client, ask) -> None:
    origin = "https://app.example.org"
    async with make_client(allowed_origins=(origin,), api_keys=("sesame",)) as client:
        preflight = {"origin": origin, "access-control-request-method": "POST"}
        allowed = await client.options("/v1/chat/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == origin
        headers = {"origin": origin, "authorization": "Bearer sesame"}
        response = await client.post("/v1/chat/completions", json=ask(), headers=headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
        foreign = await client.get("/v1/models", headers=headers | {"origin": "https://evil.example"})
        assert (foreign.status_code, error_of(foreign)["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nothing"])
async def test_foreign_hosts_reach_no_path(client, path) -> None:
    response = await client.get(path, headers={"host": "evil.example"})
    assert (response.status_code, error_of(response)["code"]) == (403, "host_not_allowed")
    assert "--allow-host" in error_of(response)["message"]
