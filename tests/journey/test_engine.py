"""The engine as clients see it: many answers together, a bounded line, reuse, reduction inside the decoder, a stop."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from mm.config import ModelConfig
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.runtime import LocalRuntime
from serve.stages import build_local_runtime
from tests.journey.test_forgotten import HEADERS, requests_in_memory

MODEL = ModelConfig(dtype="float32", num_threads=1, max_num_seqs=2, max_waiting=1)
PATH = "/v1/chat/completions"
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime() -> AsyncIterator[LocalRuntime]:
    runtime = build_local_runtime(ServeConfig(model=MODEL))
    yield runtime
    runtime.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine_client(runtime: LocalRuntime) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(runtime, ServeConfig(model=MODEL, max_queued_requests=1)))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def picture(image_url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What is this?"}]


async def figure(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


async def test_the_second_question_about_a_picture_finds_its_rows(engine_client, ask, picture) -> None:
    async def asked(**fields: Any) -> dict[str, Any]:
        body = ask(picture, max_tokens=3, temperature=0, ignore_eos=True, **fields)
        return (await engine_client.post(PATH, json=body)).json()

    def cached(answer: dict[str, Any]) -> int:
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    first, second = await asked(), await asked()
    assert cached(first) == 0
    assert second["usage"]["prompt_tokens"] - cached(second) <= 16
    assert second["choices"] == first["choices"]
    stranger = await asked(cache_salt="another tenant")
    assert cached(stranger) == 0
    assert stranger["choices"] == first["choices"]
    assert await figure(engine_client, "vllm:prefix_cache_hits_total") == cached(second)
    assert await figure(engine_client, "vllm:prefix_cache_queries_total") == 3 * first["usage"]["prompt_tokens"]
    assert await figure(engine_client, "vllm:kv_cache_usage_perc") == 0
    assert await figure(engine_client, "mm:kv_cache_prefix_bytes") > 0
    assert await figure(engine_client, "vllm:inter_token_latency_seconds_count") == 3 * 2
    assert await figure(engine_client, "vllm:time_to_first_token_seconds_count") == 3
    waited = await figure(engine_client, "vllm:time_to_first_token_seconds_sum")
    assert 0 < waited < await figure(engine_client, "vllm:e2e_request_latency_seconds_sum")


@pytest.mark.parametrize(
    ("reducer", "in_prompt", "kept"),
    [
        ("fastv:keep_ratio=0.25", 1.0, 0.25),
        ("divprune:keep_ratio=0.5 + fastv:keep_ratio=0.5", 0.5, 0.25),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_reducers_inside_the_decoder(engine_client, ask, picture, reducer, in_prompt, kept, stream) -> None:
    vision = {"reducer": reducer, "return_map": True}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = ask(picture, vision=vision, max_tokens=3, temperature=0, stream=stream, **options)
    response = await engine_client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    text = response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text
    answer = json.loads(text)
    num_in = answer["vision"]["visual_tokens_in"]
    (item,) = answer["vision"]["items"]
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == num_in * in_prompt
    assert answer["vision"]["visual_tokens_kept"] == len(item["kept"]) == num_in * kept
    assert item["kept"] == sorted(set(item["kept"]))
    assert item["kept"][-1] < num_in


async def test_a_layer_that_does_not_exist_is_the_callers_mistake(engine_client, ask, picture) -> None:
    response = await engine_client.post(PATH, json=ask(picture, vision={"reducer": "fastv:layer=99"}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "vision.reducer"


@pytest.mark.parametrize("text", ["word " * 5000, "a" * 5_000_000, "é\n" * 4096])
async def test_a_text_that_is_too_long_is_refused_before_its_picture_is_encoded(
    runtime, engine_client, ask, picture, text, monkeypatch
) -> None:
    asked: list[Any] = []
    encode = runtime._encoder.encode

    async def noted(request: Any, *rest: Any) -> Any:
        asked.append(request)
        return await encode(request, *rest)

    monkeypatch.setattr(runtime._encoder, "encode", noted)
    refused = await engine_client.post(PATH, json=ask([picture[0], {"type": "text", "text": text}]))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not asked
    answered = await engine_client.post(PATH, json=ask([picture[0], {"type": "text", "text": "word " * 300}]))
    assert answered.status_code == 200
    assert len(asked) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_line_refuses_with_a_hint_and_serves_those_in_it(engine_client, ask, stream) -> None:
    """The engine takes three, one is held back, and the rest is refused."""
    body = ask("Hello", max_tokens=60, ignore_eos=True, stream=stream)
    responses = await asyncio.gather(*(engine_client.post(PATH, json=body) for _ in range(8)))
    assert sorted(response.status_code for response in responses) == [200] * 4 + [429] * 4
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert (await engine_client.post(PATH, json=body)).status_code == 200


async def test_a_request_past_its_deadline_leaves_the_engine(runtime, ask) -> None:
    config = ServeConfig(model=MODEL, request_timeout_s=0.1)
    transport = httpx.ASGITransport(app=create_app(runtime, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        response = await client.post(PATH, json=ask("Hello", max_tokens=2000, ignore_eos=True))
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    for _ in range(100):
        if not (await runtime.load()).num_running:
            break
        await asyncio.sleep(0.02)
    assert (await runtime.load()).num_running == 0


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"vision": {"reducer": "divprune", "keep_ratio": 0.5}}, 200),
        ({"vision": {"reducer": "fastv", "keep_ratio": 0.5}, "n": 2}, 200),
        ({"speculation": {"drafter": "copy"}}, 400),
        ({"vision": {"reducer": "divprune", "keep_ratio": 1.5}}, 400),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}}, 400),
        ({"max_tokens": 100_000}, 400),
    ],
)
async def test_a_request_with_a_picture_is_forgotten(engine_client, ask, picture, fields, status) -> None:
    """Without the garbage collector, which may be minutes away while nobody asks."""
    content = [*picture, {"type": "text", "text": "What is it?"}]
    body = ask(content) | {"max_tokens": 3} | fields
    gc.collect()
    gc.disable()
    logging.disable()  # records of the log hold tracebacks
    try:
        for _ in range(2):
            answer = await engine_client.post(PATH, json=body, headers=HEADERS)
            assert answer.status_code == status, answer.text
        await asyncio.sleep(0.1)
        assert requests_in_memory() == []
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
