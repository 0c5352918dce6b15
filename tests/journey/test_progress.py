"""How far a long clip is, in the stream, before the first token."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from mm.errors import MediaError
from tests.journey.test_lifetimes import Caller, cancelled, in_flight


def pieces(text: str) -> list[str]:
    return [piece for piece in text.split("\n\n") if piece]


async def test_progress_is_comments_between_the_role_and_the_first_token(client, engine, ask, image_url) -> None:
    engine.progress = (16, 32, 48)
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What?"}]
    response = await client.post("/v1/chat/completions", json=ask(content, stream=True))
    found = pieces(response.text)
    assert found[1:4] == [f": encoded {count} of 48 frames" for count in (16, 32, 48)]
    events = [json.loads(piece.removeprefix("data: ")) for piece in found[:-1] if piece[0] != ":"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == "".join(
        engine.words
    )
    assert found[-1] == "data: [DONE]"


async def test_without_progress_the_stream_is_as_ever(client, engine, ask) -> None:
    response = await client.post("/v1/chat/completions", json=ask(stream=True))
    assert not [piece for piece in pieces(response.text) if piece[0] == ":"]


async def test_whole_answers_have_no_progress(client, engine, ask, image_url) -> None:
    engine.progress = (16, 32)
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What?"}]
    response = await client.post("/v1/chat/completions", json=ask(content))
    assert response.json()["choices"][0]["message"]["content"] == "".join(engine.words)


@pytest.mark.parametrize("told", [(), (16,)])
async def test_a_failure_has_its_status_until_something_was_told(client, engine, ask, image_url, told) -> None:
    engine.progress, engine.encode_error = told, MediaError("undecodable", "video")
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What?"}]
    response = await client.post("/v1/chat/completions", json=ask(content, stream=True))
    if not told:
        assert (response.status_code, response.json()["error"]["code"]) == (400, "media_undecodable")
        return
    assert response.status_code == 200
    *_, error, done = pieces(response.text)
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "media_undecodable"
    assert done == "data: [DONE]"
    assert in_flight(client) == 0


async def test_leaving_while_a_clip_is_encoded_ends_its_encoding(client, engine, ask, image_url, until) -> None:
    engine.encode_gate = threading.Event()
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What?"}]
    caller = Caller(client.app, ask(content, stream=True))
    task = caller.call()
    while b": encoded" not in (await asyncio.wait_for(caller.sent.get(), 10)).get("body", b""):
        pass
    caller.gone.set()
    await task
    assert await until(lambda: engine.num_encoding == 0)
    assert in_flight(client) == 0
    assert cancelled(client) == 1
    assert engine.num_open == 0
