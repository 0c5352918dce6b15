"""R18: a server that is stopped under load finishes what it has begun."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Iterator

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check
from demos.bench.reliability.load import PATH, body, classify
from demos.bench.reliability.server import ON_RAY, Server, left_after, server

NUM_STREAMS = 8
DRAIN_S = 60
"""The drain timeout that the server is given; the streams are much shorter."""


@check("R18")
def in_process(settings: Settings) -> Iterator[Figure]:
    """SIGTERM under streams, on a server in one process."""
    yield from _stopped(settings, "in process", "--in-process", "--kv-cache-gb", "0.1")


@check("R18")
def on_ray(settings: Settings) -> Iterator[Figure]:
    """SIGTERM under streams, on a server on Ray."""
    yield from _stopped(settings, "on Ray", *ON_RAY)


def _stopped(settings: Settings, where: str, *options: str) -> Iterator[Figure]:
    rng = random.Random(f"{settings.seed} R18 {where}")
    with server("--drain-timeout-s", str(DRAIN_S), *options) as running:
        pids = running.all_pids()
        num_finished = asyncio.run(_stop_under_streams(running, rng))
        start = time.monotonic()
        code = running.process.wait(DRAIN_S + 30)
        stop_s = time.monotonic() - start
    yield at_least(f"{where}: of {NUM_STREAMS} running streams came to their end", num_finished, NUM_STREAMS)
    yield at_most(f"{where}: exit code", abs(code), 0)
    yield at_most(f"{where}: from the last stream's end to the server's", stop_s, 30, "s")
    yield at_most(f"{where}: processes left after 5 s", len(left_after(pids, 5.0)), 0)


async def _stop_under_streams(running: Server, rng: random.Random) -> int:
    """Send SIGTERM when all streams have begun; how many came to their end."""
    begun = asyncio.Barrier(NUM_STREAMS + 1)
    async with httpx.AsyncClient(base_url=running.url, timeout=150) as client:

        async def one() -> bool:
            request = body(rng, is_stream=True, has_picture=rng.random() < 0.5, num_tokens=200)
            async with client.stream("POST", PATH, json=request) as response:
                lines = response.aiter_lines()
                text = [await anext(lines)]
                await begun.wait()
                text += [line async for line in lines]
            return classify(response.status_code, dict(response.headers), "\n".join(text), is_stream=True) == "answered"

        streams = [asyncio.create_task(one()) for _ in range(NUM_STREAMS)]
        await begun.wait()
        running.process.send_signal(signal.SIGTERM)
        return sum(end is True for end in await asyncio.gather(*streams, return_exceptions=True))
