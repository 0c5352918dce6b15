"""Clients that send or read slowly: they hold no place, have limits of their own, and get a readable answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from mm.config import ModelConfig
from serve.api import body as body_module
from serve.api.connection import connection_class
from serve.api.room import Room
from tests.journey.conftest import build
from tests.journey.test_lifetimes import Caller, in_flight


class SlowCaller(Caller):
    """Sends `first`, and the rest of its body when `rest` is set."""

    def __init__(self, app: Any, body: dict[str, Any], num_first: int = 1, address: str = "127.0.0.1") -> None:
        super().__init__(app, body)
        self.scope |= {"client": (address, 1)}
        self.num_first, self.rest = num_first, asyncio.Event()
        self.has_begun = False

    async def receive(self) -> dict[str, Any]:
        if not self.has_begun:
            self.has_begun = True
            return {"type": "http.request", "body": self._content[: self.num_first], "more_body": True}
        if not self.body_sent:
            await self.rest.wait()
            self.body_sent = True
            return {"type": "http.request", "body": self._content[self.num_first :], "more_body": False}
        return await super().receive()

    async def answer(self) -> tuple[int, dict[str, Any]]:
        start, content = await self.sent.get(), b""
        while (message := await self.sent.get()).get("more_body"):
            content += message["body"]
        return start["status"], json.loads(content + message["body"])


async def test_bodies_that_do_not_come_keep_nobody_out(make_client, ask, until) -> None:
    async with make_client(model=ModelConfig(max_num_seqs=1, max_waiting=1), max_queued_requests=0) as client:
        slow = [SlowCaller(client.app, ask()) for _ in range(30)]
        tasks = [caller.call() for caller in slow]
        assert await until(lambda: all(caller.has_begun for caller in slow))
        assert in_flight(client) == 0
        assert (await client.post("/v1/chat/completions", json=ask())).status_code == 200
        slow[0].rest.set()
        assert (await slow[0].answer())[0] == 200
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("limit", ["time", "speed"])
async def test_a_body_that_is_too_slow_is_an_error(make_client, ask, monkeypatch, limit) -> None:
    monkeypatch.setattr(body_module, "SPEED_GRACE_S", 0.0)
    options = {"body_timeout_s": 0.02} if limit == "time" else {"min_body_bytes_per_s": 50.0}
    async with make_client(**options) as client:
        caller = SlowCaller(client.app, ask())
        task = caller.call()
        caller.gone.set()
        status, answer = await caller.answer()
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
        caller.rest.set()
        await task


async def test_of_too_many_bodies_of_one_address_the_slowest_is_refused(make_client, ask, monkeypatch, until) -> None:
    monkeypatch.setattr(body_module, "EVICTION_GRACE_S", 0.0)
    monkeypatch.setattr(body_module, "EVICTED_WAIT_S", 0.5)
    async with make_client(max_arriving_per_address=2) as client:
        quick, slow = SlowCaller(client.app, ask(), 40), SlowCaller(client.app, ask(), 1)
        other = SlowCaller(client.app, ask(), 1, address="10.0.0.7")
        tasks = [caller.call() for caller in (quick, slow, other)]
        assert await until(lambda: quick.has_begun and slow.has_begun and other.has_begun)
        await asyncio.sleep(0.01)
        assert (await client.post("/v1/chat/completions", json=ask())).status_code == 200
        slow.rest.set()
        with pytest.raises(TimeoutError):  # it waits, so that it does not come again at once
            await asyncio.wait_for(slow.sent.get(), 0.1)
        status, answer = await slow.answer()
        assert (status, answer["error"]["code"]) == (429, "overloaded")
        quick.rest.set()
        other.rest.set()
        assert (await quick.answer())[0] == (await other.answer())[0] == 200
        await asyncio.gather(*tasks)


async def test_the_memory_of_bodies_under_way_is_bounded(make_client, ask, until) -> None:
    async with make_client(max_body_bytes=1000, max_arriving_bytes=0) as client:
        callers = [SlowCaller(client.app, ask("x" * 800), 800) for _ in range(2)]
        tasks = [caller.call() for caller in callers]
        assert await until(lambda: all(caller.has_begun for caller in callers))
        for caller in callers[::-1]:
            caller.rest.set()
        assert [(await caller.answer())[0] for caller in callers[::-1]] == [429, 200]
        await asyncio.gather(*tasks)
        assert (await client.post("/v1/chat/completions", json=ask("x" * 800))).status_code == 200


@contextlib.contextmanager
def listening(
    app: Any, header_timeout_s: float = 20.0, send_timeout_s: float = 60.0, room: Room | None = None
) -> Iterator[tuple[str, int]]:
    """`app` on a real socket with our connections; its address."""
    protocol = connection_class(header_timeout_s, send_timeout_s, room)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, ws="none", log_config=None, lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        try:
            yield listener.getsockname()
        finally:
            server.force_exit = server.should_exit = True
            thread.join()


def read_all(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer, read until the server closes."""
    received = b""
    while piece := connection.recv(65_536):
        received += piece
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", HEAD])
def test_a_header_that_does_not_come_ends_the_connection(engine, sent) -> None:
    app, runtime = build(engine)
    with listening(app, header_timeout_s=0.05) as address, socket.create_connection(address, 10) as connection:
        connection.sendall(sent)
        status, answer = read_all(connection)
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
    runtime.close()


def test_what_is_no_http_is_an_error_in_the_same_form(engine) -> None:
    app, runtime = build(engine)
    with listening(app) as address, socket.create_connection(address, 10) as connection:
        connection.sendall(b"no http\r\n\r\n")
        status, answer = read_all(connection)
        assert (status, answer["error"]["code"]) == (400, "invalid_http")
    runtime.close()


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", 413), ("/nothing", 404), ("/health", 405)])
def test_a_refusal_is_readable_for_a_client_that_sends_first(engine, announced, path, status) -> None:
    """Without the rest of the body read, the kernel would reset the connection and drop the answer."""
    app, runtime = build(engine, max_body_bytes=100_000)
    size = 5_000_000
    head = HEAD.replace(b"/v1/chat/completions", path.encode())
    length = b"Content-Length: %d\r\n\r\n" % size if announced else b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size
    with listening(app) as address, socket.create_connection(address, 10) as connection:
        connection.sendall(head + length)
        for _ in range(100):
            connection.sendall(b"x" * (size // 100))
        if not announced:
            connection.sendall(b"\r\n0\r\n\r\n")
        found, answer = read_all(connection)
        assert found == status
        assert answer["error"]["message"]
    runtime.close()


def test_a_client_that_asks_before_it_sends_is_refused_at_once(engine) -> None:
    app, runtime = build(engine, max_body_bytes=1000)
    with listening(app) as address, socket.create_connection(address, 10) as connection:
        connection.sendall(HEAD + b"Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n")
        assert read_all(connection)[0] == 413
    runtime.close()


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    has_ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        has_ended.set()

    with listening(app, send_timeout_s=0.1) as address, socket.create_connection(address, 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert has_ended.wait(10)
