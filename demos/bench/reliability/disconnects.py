"""R7: clients that leave in the middle. Nothing of their requests may stay."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check
from demos.bench.reliability.load import PATH, body
from demos.bench.reliability.server import ON_RAY, Server, server

NUM_AT_A_TIME = 16
BACK_S = 2.0
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "mm:num_requests_in_flight")


@check("R7")
def in_process(settings: Settings) -> Iterator[Figure]:
    """Half of the clients leave, on a server in one process."""
    yield from _half_leave(settings, "in process", "--in-process", "--kv-cache-gb", "0.1")


@check("R7")
def on_ray(settings: Settings) -> Iterator[Figure]:
    """Half of the clients leave, on a server on Ray."""
    yield from _half_leave(settings, "on Ray", *ON_RAY)


def _half_leave(settings: Settings, where: str, *options: str) -> Iterator[Figure]:
    rng = random.Random(f"{settings.seed} R7 {where}")
    with server(*options) as running:
        num_left, num_finished = asyncio.run(_streams(running, settings.size(60, 1000), rng))
        start = time.monotonic()
        while (busy := _busy(running)) and time.monotonic() - start < 30:
            time.sleep(0.05)
        back_s = time.monotonic() - start if not busy else float("inf")
    yield at_least(f"{where}: clients that left in the middle", num_left, 1)
    yield at_least(f"{where}: clients that stayed and got their whole stream", num_finished, 1)
    yield at_most(f"{where}: from the last end until all gauges are back at 0", back_s, BACK_S, "s")


def _busy(running: Server) -> dict[str, float]:
    gauges = running.gauges()
    return {name: gauges[name] for name in GAUGES if gauges[name]}


async def _streams(running: Server, count: int, rng: random.Random) -> tuple[int, int]:
    """Run streams of which half are cut at random; how many were cut, and how many came to their end."""
    places = asyncio.Semaphore(NUM_AT_A_TIME)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:

        async def one(index: int) -> bool:
            """Whether the stream came to its end."""
            chunks_wanted = rng.randrange(1, 30) if index % 2 else None
            request = body(rng, is_stream=True, has_picture=rng.random() < 0.5, num_tokens=60)
            async with places, client.stream("POST", PATH, json=request) as response:
                num_chunks = 0
                async for line in response.aiter_lines():
                    num_chunks += line.startswith("data: ")
                    if num_chunks == chunks_wanted:
                        return False
                    if line == "data: [DONE]":
                        return True
            return False

        ends = await asyncio.gather(*(one(index) for index in range(count)))
    return ends.count(False), ends.count(True)
