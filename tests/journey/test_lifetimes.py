"""What is held while a request runs, and that it is given back however the request ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest


class Caller:
    """Drives the ASGI application by hand, so that it can go away whenever it likes."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.body_sent = False
        self.gone = asyncio.Event()
        content = json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._content = content
        self._app = app

    def call(self, send: Any = None) -> asyncio.Task[None]:
        return asyncio.create_task(self._app(self.scope, self.receive, send or self.send))

    async def receive(self) -> dict[str, Any]:
        if not self.body_sent:
            self.body_sent = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.sent.put(message)


def in_flight(client: Any) -> float:
    return client.app.state.metrics.registry.get_sample_value("mm:num_requests_in_flight", {"model_name": "tiny"}) or 0


def cancelled(client: Any) -> float:
    labels = {"model_name": "tiny"}
    return client.app.state.metrics.registry.get_sample_value("mm:requests_cancelled_total", labels) or 0


async def test_leaving_a_stream_closes_the_generator_within_a_token(client, engine, ask, until) -> None:
    engine.words, engine.delay_s = ("x",) * 1000, 0.01
    caller = Caller(client.app, ask(stream=True))
    task = caller.call()
    while b"content" not in (await caller.sent.get()).get("body", b""):
        pass
    assert in_flight(client) == 1
    num_tokens = engine.num_tokens
    caller.gone.set()
    assert await until(lambda: engine.num_closed == 1)
    assert engine.num_tokens - num_tokens < 100
    await task
    assert in_flight(client) == 0
    assert cancelled(client) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_started_once(client, engine, ask, stream, path) -> None:
    body = ask(stream=stream) if "chat" in path else {"model": "tiny", "input": "What?", "stream": stream}
    assert (await client.post(path, json=body)).status_code == 200
    assert engine.num_open == engine.num_closed == len(engine.requests) == 1
    assert engine.num_tokens == len(engine.words)


async def test_leaving_before_the_answer_cancels_it(client, engine, ask, until) -> None:
    engine.words, engine.delay_s = ("x",) * 1000, 0.01
    caller = Caller(client.app, ask())
    task = caller.call()
    assert await until(lambda: engine.num_tokens > 2)
    caller.gone.set()
    await task
    assert await until(lambda: engine.num_closed == 1)
    assert engine.num_tokens < 500
    assert in_flight(client) == 0
    assert cancelled(client) == 1


async def test_leaving_while_waiting_never_starts(client, engine, ask, until) -> None:
    engine.gate = threading.Event()
    first = Caller(client.app, ask()).call()
    assert await until(lambda: engine.num_open == 1)
    second = Caller(client.app, ask(stream=True))
    waiting = second.call()
    assert await until(lambda: in_flight(client) == 2)
    second.gone.set()
    await waiting
    engine.gate.set()
    await first
    assert (engine.num_open, engine.num_closed) == (1, 1)
    assert in_flight(client) == 0


async def test_a_client_gone_before_the_first_byte_gives_its_place_back(client, engine, ask, until) -> None:
    async def broken(message: dict[str, Any]) -> None:
        raise OSError("connection reset")

    task = Caller(client.app, ask(stream=True)).call(broken)
    with pytest.raises(OSError, match="reset"):
        await task
    assert await until(lambda: in_flight(client) == 0)
    assert await until(lambda: engine.num_open == engine.num_closed)


async def test_slow_reader_is_cut_off(make_client, engine, ask, until) -> None:
    async with make_client(send_timeout_s=0.1) as client:
        caller = Caller(client.app, ask(stream=True))

        async def stuck(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        task = caller.call(stuck)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            await task
        assert time.monotonic() - start < 5
        assert await until(lambda: in_flight(client) == 0)


async def test_failed_requests_give_their_place_back(client, engine, ask) -> None:
    for body in (ask(model="x"), ask(temperature=9), ask()):
        await client.post("/v1/chat/completions", json=body)
    engine.error = ValueError("x")
    await client.post("/v1/chat/completions", json=ask(stream=True))
    assert in_flight(client) == 0


@pytest.mark.parametrize("part", ["image", "role", "model"])
async def test_health_is_answered_again_and_again_while_a_large_body_is_handled(client, ask, part) -> None:
    """A step that held the loop or the interpreter would leave time for a few answers only."""
    large = "A" * 28_000_000
    bodies = {
        "image": ask([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{large}"}}]),
        "role": {"model": "tiny", "messages": [{"role": large}]},
        "model": ask() | {"model": large},
    }
    content = json.dumps(bodies[part]).encode()
    await client.get("/health")
    big = asyncio.create_task(client.post("/v1/chat/completions", content=content))
    num_answers = 0
    while not big.done():
        assert (await client.get("/health")).status_code == 200
        num_answers += 1
        await asyncio.sleep(0)
    response = await big
    assert response.status_code in (400, 404)
    assert len(response.content) < 1000
    assert num_answers > 10


async def test_streams_interleave_with_health(client, engine, ask) -> None:
    engine.words, engine.delay_s = ("x",) * 20, 0.01
    stream = asyncio.create_task(client.post("/v1/chat/completions", json=ask(stream=True)))
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await stream).text.count("content") == 21
