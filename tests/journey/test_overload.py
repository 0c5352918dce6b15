"""More requests than there is room for: connections refuse them by their first bytes, and the application as before."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mm.config import ModelConfig
from serve.api.connection import bytes_left
from serve.api.room import LIMITED_PATHS, Room
from tests.journey.conftest import build
from tests.journey.test_slow_clients import listening

SMALL = {"model": ModelConfig(max_num_seqs=1, max_waiting=1), "max_queued_requests": 1}
NUM_IN_FLIGHT = 3
PATH = "/v1/chat/completions"


class Full:
    """A server on a socket that is full until its gate opens."""

    def __init__(self, engine: Any, body: dict[str, Any], **options: Any) -> None:
        self.engine = engine
        engine.gate = threading.Event()
        self.app, self._runtime = build(engine, **SMALL | options)
        self._body, self.answers = body, list[httpx.Response]()

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[str, int]]:
        with listening(self.app, room=self.room) as address:
            self.url = f"http://{address[0]}:{address[1]}"
            callers = [threading.Thread(target=self._call) for _ in range(NUM_IN_FLIGHT)]
            for caller in callers:
                caller.start()
            wait_for(lambda: self.room.is_full)
            try:
                yield address
            finally:
                self.engine.gate.set()
                for caller in callers:
                    caller.join()
        self._runtime.close()
        assert [answer.status_code for answer in self.answers] == [200] * NUM_IN_FLIGHT

    def _call(self) -> None:
        self.answers.append(httpx.post(f"{self.url}{PATH}", json=self._body, timeout=30))

    @property
    def room(self) -> Room:
        return self.app.state.room

    @property
    def rejections(self) -> float:
        registry = self.app.state.metrics.registry
        return registry.get_sample_value("vllm:admission_rejections_total", {"model_name": "tiny"}) or 0


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_connection_refuses_with_the_words_of_the_application(engine, ask) -> None:
    full = Full(engine, ask())
    with full.serving():
        headers = {"x-request-id": "mine", "authorization": "Bearer x"}
        by_connection = httpx.post(f"{full.url}{PATH}?a=b", json=ask(), headers=headers)
        by_app = httpx.post(f"{full.url}{PATH}", json=ask(), headers=headers | {"origin": full.url})  # it is parsed
        assert by_connection.headers.pop("connection") == "close"
        names = ("content-type", "retry-after", "x-request-id", "content-length")
        assert (by_connection.status_code, by_connection.json()) == (429, by_app.json())
        assert [by_connection.headers[name] for name in names] == [by_app.headers[name] for name in names]
        assert full.rejections == 2
        assert httpx.post(f"{full.url}{PATH}", json=ask()).headers["x-request-id"] not in ("", "mine")


def test_what_does_not_compute_is_answered(engine, ask) -> None:
    full = Full(engine, ask())
    with full.serving():
        for path in ("/health", "/metrics", "/v1/models", "/v1/limits", "/openapi.json"):
            assert httpx.get(f"{full.url}{path}").status_code == 200
        assert httpx.get(f"{full.url}{PATH}").status_code == 405
        assert full.rejections == 0


def test_every_path_that_takes_a_place_is_known_to_connections(engine, ask) -> None:
    full = Full(engine, ask())
    with full.serving():
        posts = [path for path, item in httpx.get(f"{full.url}/openapi.json").json()["paths"].items() if "post" in item]
        parsed = {path: httpx.post(f"{full.url}{path}", headers={"origin": full.url}, json={}) for path in posts}
        assert {path.encode() for path, answer in parsed.items() if answer.status_code == 429} == LIMITED_PATHS


@pytest.mark.parametrize("size", [10, 100_000, 5_000_000])
def test_a_refused_client_may_send_its_whole_body_first(engine, ask, size: int) -> None:
    """Else the kernel would reset the connection, and drop the answer."""
    full = Full(engine, ask())
    with full.serving() as address, socket.create_connection(address, 10) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
        connection.sendall(head + b"x" * 5)
        for start in range(5, size, 50_000):
            connection.sendall(b"x" * min(50_000, size - start))
        received = b""
        while piece := connection.recv(65_536):
            received += piece
        assert received.startswith(b"HTTP/1.1 429 ")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"


def test_a_connection_that_was_used_before_is_refused_too(engine, ask) -> None:
    full = Full(engine, ask())
    with full.serving(), httpx.Client(base_url=full.url) as client:
        assert client.get("/health").status_code == 200
        assert client.post(PATH, json=ask()).status_code == 429
        assert client.post(PATH, json=ask()).status_code == 429  # on a new one
    with httpx.Client(base_url=full.url) as client, pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_of_many_that_come_at_once_only_as_many_are_parsed_as_there_is_room(engine, ask) -> None:
    engine.gate = threading.Event()
    app, runtime = build(engine, **SMALL)
    content = json.dumps(ask()).encode()
    request = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(content))
    num_parsed = 0

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_parsed
        num_parsed += scope["type"] == "http"
        await app(scope, receive, send)

    async def call(address: tuple[str, int]) -> int:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request + content)
        status = int((await reader.readline()).split()[1])
        writer.close()
        return status

    async def every(address: tuple[str, int]) -> list[int]:
        tasks = [asyncio.create_task(call(address)) for _ in range(40)]
        while sum(task.done() for task in tasks) < 40 - NUM_IN_FLIGHT:
            await asyncio.sleep(0.01)
        engine.gate.set()
        return [await task for task in tasks]

    with listening(counted, room=app.state.room) as address:
        statuses = asyncio.run(every(address))
    runtime.close()
    assert sorted(statuses) == [200] * NUM_IN_FLIGHT + [429] * (40 - NUM_IN_FLIGHT)
    assert num_parsed == NUM_IN_FLIGHT


@pytest.mark.parametrize("wrong", ["key", "body", "http", "gone"])
def test_a_place_that_nobody_uses_is_given_back(engine, ask, wrong: str) -> None:
    app, runtime = build(engine, api_keys=("sesame",), **SMALL)
    content = b"{" if wrong == "body" else json.dumps(ask()).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    head += "" if wrong == "key" else "Authorization: Bearer sesame\r\n"
    head += "bad header\r\n" if wrong == "http" else ""
    with listening(app, room=app.state.room) as address:
        for _ in range(3 * NUM_IN_FLIGHT):
            with socket.create_connection(address, 10) as connection:
                connection.sendall(head.encode() + b"\r\n" + content)
                if wrong != "gone":
                    status = int(connection.recv(65_536).split()[1])
                    assert status == {"key": 401, "body": 400, "http": 400}[wrong]
        wait_for(lambda: not app.state.room.num_in_flight)
        answer = httpx.post(
            f"http://{address[0]}:{address[1]}{PATH}", json=ask(), headers={"Authorization": "Bearer sesame"}
        )
        assert answer.status_code == 200
    runtime.close()


def test_media_of_requests_that_wait_are_not_encoded_yet(engine, ask, image_url) -> None:
    """The engine takes two, and the third is held back; before, it was encoded and then refused."""
    full = Full(engine, ask([{"type": "image_url", "image_url": {"url": image_url}}]))
    with full.serving():
        wait_for(lambda: engine.num_open)
        time.sleep(0.1)
        assert len({request.request_id for request in engine.requests}) == NUM_IN_FLIGHT - 1
    assert len({request.request_id for request in engine.requests}) == NUM_IN_FLIGHT


HEAD = b"POST /tokenize HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("data", "num_left"),
    [
        (HEAD + b"Content-Length: 7\r\n\r\nabc", 4),
        (HEAD + b"content-length:7\r\n\r\n", 7),
        (HEAD + b"Content-Length: 3\r\n\r\nabc", 0),
        (HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n", 0),
        (HEAD + b"Content-Length: 9\r\n\r", None),
        (HEAD + b"Content-Length: 9\r\nContent-Length: 9\r\n\r\n", None),
        (HEAD + b"Content-Length: 9\r\nOrigin: https://a\r\n\r\n", None),
        (HEAD + b"Content-Length: -9\r\n\r\n", None),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", None),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", None),
        (HEAD + b"\r\nContent-Length: 9\r\n\r\n", None),
        (HEAD.replace(b"POST", b"GET") + b"Content-Length: 9\r\n\r\n", None),
        (HEAD.replace(b"tokenize", b"health") + b"Content-Length: 9\r\n\r\n", None),
        (b"x" + HEAD + b"Content-Length: 9\r\n\r\n", None),
    ],
)
def test_what_is_not_known_for_sure_is_parsed(data: bytes, num_left: int | None) -> None:
    assert bytes_left(data) == num_left
