"""Every shape of request that real clients send, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest


async def post(client: Any, body: Any, **options: Any) -> Any:
    return await client.post("/v1/chat/completions", json=body, **options)


def events_of(text: str) -> list[Any]:
    """The data of every SSE frame."""
    return [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame.startswith("data: ")]


async def test_answer_has_openais_form(client, ask) -> None:
    response = await post(client, ask(), headers={"x-request-id": "abc-1"})
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "abc-1"
    answer = response.json()
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "id": "chatcmpl-abc-1",
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A red circle✓.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 0, "video_tokens": 0},
            "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
        "vision": {"reducer": "none", "visual_tokens_in": 0, "visual_tokens_kept": 0},
    }


async def test_images_and_clips_reach_the_engine_as_bytes_in_order(client, engine, ask, image_url) -> None:
    clip = "data:video/mp4;base64,AAAA"
    content = [
        {"type": "image_url", "image_url": {"url": image_url}},
        {"type": "text", "text": "then"},
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "image_url", "image_url": {"url": image_url, "detail": "low"}},
    ]
    vision = {"reducer": "divprune", "keep_ratio": 0.25, "return_map": True, "return_timings": True}
    response = await post(client, ask(content, vision=vision))
    assert response.status_code == 200
    media = engine.requests[0].media
    assert [item.kind for item in media] == ["image", "video", "image"]
    assert all(isinstance(item.data, bytes) for item in media)
    assert media[1].data == b"\0\0\0"
    answer = response.json()
    assert answer["vision"]["visual_tokens_kept"] == 6
    assert answer["vision"]["items"][0] == {"kind": "image", "grid": [1, 3, 4], "kept": [0, 11]}
    assert answer["vision"]["timings"]["prefill_s"] == 0.25
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 9
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 12


SHAPES: dict[str, dict[str, Any]] = {
    "both limits": {"max_tokens": 3, "max_completion_tokens": 5},
    "explicit nulls": {"max_tokens": None, "stop": None, "tools": None, "logprobs": None, "vision": None, "seed": None},
    "terminal chat": {"generation_config": '{"do_sample": false}', "stream": False},
    "client defaults": {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "n": 1,
    },
    "load generator": {"ignore_eos": True, "temperature": 0, "max_tokens": 4, "top_k": -1, "repetition_penalty": 1.0},
    "alias": {"model": "alias/tiny"},
    "stop list": {"stop": ["\n", "END"]},
    "negative seed": {"seed": -5},
    "whole numbers": {"temperature": 1, "top_p": 1},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
async def test_shapes_that_clients_send(client, ask, fields) -> None:
    response = await post(client, ask() | fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["finish_reason"] == "stop"


async def test_content_parts_may_carry_nulls(client, engine, ask, image_url) -> None:
    content = [
        {"type": "text", "text": "Look", "image_url": None},
        {"type": "image_url", "text": None, "image_url": {"url": image_url, "detail": None}},
    ]
    assert (await post(client, ask(content))).status_code == 200
    assert len(engine.requests[0].media) == 1


async def test_fields_arrive_in_sampling(client, engine, ask) -> None:
    body = ask(
        max_tokens=3, max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=7, stop="x", n=2, ignore_eos=True
    )
    body |= {"top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5}
    body |= {"logit_bias": {"5": -100, "7": 0.5}, "stop_token_ids": [9], "min_tokens": 2}
    body |= {"logprobs": True, "top_logprobs": 4}
    assert (await post(client, body)).status_code == 200
    sampling = engine.requests[-1].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.5, 0.9, 7)
    assert (sampling.stop, sampling.n, sampling.ignore_eos) == (("x",), 2, True)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.logit_bias, sampling.stop_token_ids, sampling.min_tokens) == (((5, -100), (7, 0.5)), (9,), 2)
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 4)


async def test_ignored_fields_are_named(client, ask) -> None:
    response = await post(client, ask(user="u", generation_config="{}"))
    assert response.headers["x-mm-ignored-fields"] == "generation_config, user"


async def test_stream_is_role_then_deltas_then_reason_then_usage_then_done(client, ask) -> None:
    response = await post(client, ask(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, done = events_of(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(frame) for frame in frames]
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert [delta["delta"].get("content") for delta in deltas[1:]] == ["A ", "red ", "circle", "✓.", None]
    assert [delta["finish_reason"] for delta in deltas] == [None] * 5 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5


async def test_stream_without_usage_ends_with_the_reason(client, ask) -> None:
    *frames, done = events_of((await post(client, ask(stream=True))).text)
    assert done == "[DONE]"
    assert json.loads(frames[-1])["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in json.loads(frame) for frame in frames)


async def test_continuous_usage_counts_up(client, ask) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *frames, _ = events_of((await post(client, ask(stream=True, stream_options=options))).text)
    counts = [json.loads(frame)["usage"] for frame in frames]
    counts = [count["completion_tokens"] for count in counts if count]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 5


async def test_streamed_map_comes_last(client, ask, image_url) -> None:
    content = [{"type": "image_url", "image_url": {"url": image_url}}]
    response = await post(client, ask(content, stream=True, vision={"return_map": True}))
    last = json.loads(events_of(response.text)[-2])
    assert last["choices"] == []
    assert last["vision"]["items"][0]["kept"] == [0, 11]


async def test_choices_stream_under_their_index(client, ask) -> None:
    *frames, _ = events_of((await post(client, ask(stream=True, n=2))).text)
    texts = {0: "", 1: ""}
    for frame in frames:
        for choice in json.loads(frame)["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "A red circle✓.", 1: "A red circle✓."}


async def test_large_bodies_are_parsed_too(client, engine, ask, image_url) -> None:
    response = await post(client, ask([{"type": "text", "text": "x" * 300_000}]))
    assert response.status_code == 200
    assert len(engine.requests[-1].messages[0].parts[0].text) == 300_000


async def test_models_are_listed_under_every_name(client) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "alias/tiny"]
    assert listed["data"][0]["max_model_len"] == 2048
    assert (await client.get("/v1/models/alias/tiny")).json()["id"] == "alias/tiny"


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/v1/models", "/metrics"])
async def test_head_is_answered_like_get(client, path) -> None:
    assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


async def test_terminal_chat_clients_are_reported_that_the_model_is_ready(client) -> None:
    response = await client.post("/load_model", json={"model": "tiny"})
    assert json.loads(events_of(response.text)[0]) == {"status": "ready", "model": "tiny", "cached": True}
    assert (await client.post("/load_model", json={"model": "other"})).status_code == 404


async def test_schema_is_served_and_pages_are_not(client) -> None:
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert set(schema["components"]["schemas"]) >= {"Vision", "StreamOptions"}
    assert (await client.get("/docs")).status_code == 404
