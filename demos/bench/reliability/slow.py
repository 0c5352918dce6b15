"""R8: clients that send or read slowly. Others must not notice.

The clients run on the same cores as the server, so others are compared with what they see while the same clients are as
slow against a server that only listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_most, check, noted
from demos.bench.reliability.load import PATH, body
from demos.bench.reliability.server import Server, server

NUM_SLOW = 1000
BYTE_EVERY_S = 1.0
SLOWER = 1.1
"""Median of others beside slow clients, over the median beside clients that are slow elsewhere."""
NUM_READERS = 100
LOGPROBS = {"logprobs": True, "top_logprobs": 20}
"""Kilobytes per token: what nobody reads then fills the kernel's buffers, which hold megabytes."""


@check("R8")
def writers(settings: Settings) -> Iterator[Figure]:
    """1,000 connections that send a byte a second, and come again when they are refused."""
    rng = random.Random(f"{settings.seed} R8")
    with server("--in-process", "--kv-cache-gb", "0.1") as running, sink() as nobody:
        count = settings.size(100, 500)
        asyncio.run(median_s(running, 20, rng))
        alone_s = asyncio.run(median_s(running, count, rng))
        with slow_clients(nobody):
            control_s = asyncio.run(median_s(running, count, rng))
        with slow_clients(address_of(running)):
            beside_s = asyncio.run(median_s(running, count, rng))
    yield noted("median alone, ms", 1000 * alone_s)
    yield noted(f"median while {NUM_SLOW} clients are slow elsewhere, ms", 1000 * control_s)
    yield noted(f"median beside {NUM_SLOW} slow clients, ms", 1000 * beside_s)
    yield at_most("median beside slow clients, over that while they are slow elsewhere", beside_s / control_s, SLOWER)


@check("R8")
def readers(settings: Settings) -> Iterator[Figure]:
    """Streams of which nothing is read. They are cut off, and hold nothing afterwards."""
    rng = random.Random(f"{settings.seed} R8 readers")
    options = ("--in-process", "--kv-cache-gb", "0.1", "--send-timeout-s", "3")
    with server(*options) as running, contextlib.ExitStack() as open_sockets:
        for _ in range(NUM_READERS):
            connection = open_sockets.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(address_of(running))
            connection.sendall(as_http(body(rng, is_stream=True, has_picture=False, num_tokens=3000) | LOGPROBS))
        start = time.monotonic()
        answered_s = asyncio.run(median_s(running, 5, rng))
        answered_after_s = time.monotonic() - start
        while (busy := running.gauges()["mm:num_requests_in_flight"]) and time.monotonic() - start < 300:
            time.sleep(0.5)
    yield noted(f"median of 5 requests beside {NUM_READERS} streams that nobody reads, ms", 1000 * answered_s)
    yield noted("all five were answered after, s", answered_after_s)
    yield noted("the last of them had ended, cut off or done, after, s", time.monotonic() - start)
    yield at_most("requests in flight after all were cut off or done", busy, 0)


def as_http(content: dict) -> bytes:
    text = json.dumps(content).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    return head.encode() + b"\r\n\r\n" + text


def address_of(running: Server) -> tuple[str, int]:
    url = httpx.URL(running.url)
    return url.host, url.port or 80


async def median_s(running: Server, count: int, rng: random.Random) -> float:
    """Of so many short requests, one after the other."""
    found = []
    async with httpx.AsyncClient(base_url=running.url, timeout=300) as client:
        for _ in range(count):
            start = time.monotonic()
            response = await client.post(PATH, json=body(rng, is_stream=False, has_picture=False, num_tokens=8))
            response.raise_for_status()
            found.append(time.monotonic() - start)
    return statistics.median(found)


@contextlib.contextmanager
def slow_clients(address: tuple[str, int]) -> Iterator[None]:
    """Slow clients in a process of their own, all of them connected."""
    ready = multiprocessing.get_context("spawn").Event()
    process = multiprocessing.get_context("spawn").Process(target=_be_slow, args=(address, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise RuntimeError("the slow clients did not connect")
        yield
    finally:
        process.kill()
        process.join()


def _be_slow(address: tuple[str, int], ready: Event) -> None:
    asyncio.run(_drip(address, ready))


async def _drip(address: tuple[str, int], ready: Event) -> None:
    num_connected = 0

    async def one() -> None:
        nonlocal num_connected
        is_first = True
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(*address)
                head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
                writer.write(head.encode())
                if is_first:
                    is_first, num_connected = False, num_connected + 1
                    if num_connected == NUM_SLOW:
                        ready.set()
                ending = asyncio.ensure_future(reader.read())
                while not ending.done():
                    writer.write(b" ")
                    await asyncio.wait({ending}, timeout=BYTE_EVERY_S)
                writer.close()

    await asyncio.gather(*(one() for _ in range(NUM_SLOW)))


@contextlib.contextmanager
def sink() -> Iterator[tuple[str, int]]:
    """A server that reads and says nothing; its address."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_listen, args=(queue,), daemon=True)
    process.start()
    try:
        yield "127.0.0.1", queue.get(timeout=120)
    finally:
        process.kill()
        process.join()


def _listen(ports: multiprocessing.Queue) -> None:
    async def ignore(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65_536):
                pass

    async def listen() -> None:
        listening = await asyncio.start_server(ignore, "127.0.0.1", 0, backlog=NUM_SLOW)
        ports.put(listening.sockets[0].getsockname()[1])
        await listening.serve_forever()

    asyncio.run(listen())
