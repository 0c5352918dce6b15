"""R9: ten times as many requests as the server can answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import numpy as np

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check, noted
from demos.bench.reliability.load import ANSWER_S, Load, body
from demos.bench.reliability.server import Server, server
from demos.bench.reliability.slow import address_of, as_http

BOUNDS = ("--max-num-seqs", "8", "--max-waiting", "8", "--max-queued-requests", "8")
NUM_FULL = 16
"""Clients that keep the server busy without a refusal."""
TOKENS = (20, 40)
TIMES = 10
NUM_BODIES = 400
REFUSAL_S = 0.1
GOODPUT = 0.9
RECOVERY_S = 10.0


@dataclass(frozen=True)
class Ended:
    """A request's end: the status, 0 for none, and when it was sent and answered, as times of `time.monotonic`."""

    status: int
    began: float
    ended: float


@check("R9")
def ten_times(settings: Settings) -> Iterator[Figure]:
    """Requests arrive at ten times the rate that the server reached with as many clients as it takes.

    The clients are on the server's cores, so they do little: their requests are made before, and sent as bytes.
    """
    rng = random.Random(f"{settings.seed} R9")
    seconds = settings.size(15, 120)
    bodies = [_request(rng) for _ in range(NUM_BODIES)]
    with server("--in-process", "--kv-cache-gb", "0.1", *BOUNDS) as running:
        address = address_of(running)
        asyncio.run(_closed(address, 3, bodies))
        alone_s = asyncio.run(_alone(running, rng, 5))
        peak = _rate(asyncio.run(_closed(address, seconds, bodies)), seconds)
        ends = asyncio.run(_open(address, seconds, TIMES * peak, bodies, rng))
        recovery_s = _recovery_s(running, rng, alone_s)
    refused = [end.ended - end.began for end in ends if end.status in (429, 503)]
    others = [end for end in ends if end.status not in (200, 429, 503)]
    yield noted("peak, answers per second", peak)
    yield at_least("requests offered, of ten times the peak", len(ends) / (TIMES * peak * seconds), 0.8)
    yield at_least("refused requests", len(refused), 1)
    yield at_most(
        "refusals: 99 % are sent within", float(np.percentile(refused, 99)) if refused else 0.0, REFUSAL_S, "s"
    )
    yield at_most("accepted requests that failed", len(others), 0)
    yield at_least("goodput at ten times the peak rate, of the peak", _rate(ends, seconds) / peak, GOODPUT)
    yield at_most("a lone request is as fast as before after", recovery_s, RECOVERY_S, "s")


def _request(rng: random.Random) -> bytes:
    content = body(rng, is_stream=False, has_picture=rng.random() < 0.5, num_tokens=rng.randint(*TOKENS))
    return as_http(content).replace(b"Host:", b"Connection: close\r\nHost:", 1)


async def _send(address: tuple[str, int], content: bytes) -> Ended:
    start, status = time.monotonic(), 0
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(content)
            answer = await reader.read()
            writer.close()
            status = int(answer.split(b" ", 2)[1])
    except (OSError, TimeoutError, IndexError, ValueError):
        pass
    return Ended(status, start, time.monotonic())


async def _closed(address: tuple[str, int], seconds: float, bodies: list[bytes]) -> list[Ended]:
    """As many clients as the server takes; what they had answered within the time."""
    ends: list[Ended] = []
    upcoming, stop = itertools.cycle(bodies), time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < stop:
            ends.append(await _send(address, next(upcoming)))

    await asyncio.gather(*(client() for _ in range(NUM_FULL)))
    return [end for end in ends if end.ended <= stop]


async def _open(
    address: tuple[str, int], seconds: float, rate: float, bodies: list[bytes], rng: random.Random
) -> list[Ended]:
    """Requests at random times, whether or not earlier ones were answered. Answers that come too late do not count."""
    upcoming, start, due, tasks = itertools.cycle(bodies), time.monotonic(), 0.0, []
    while (now := time.monotonic() - start) < seconds:
        while due <= now:
            tasks.append(asyncio.create_task(_send(address, next(upcoming))))
            due += rng.expovariate(rate)
        await asyncio.sleep(max(0.001, min(due, seconds) - now))
    ends = await asyncio.gather(*tasks)
    return [end for end in ends if end.status != 200 or end.ended <= start + seconds]


def _rate(ends: list[Ended], seconds: float) -> float:
    return sum(end.status == 200 for end in ends) / seconds


async def _alone(running: Server, rng: random.Random, count: int) -> float:
    """Seconds of one request when nobody else asks, the median of some."""
    load = Load(running.url, rng, 0, (30, 30), retries=False)
    async with httpx.AsyncClient(base_url=running.url, timeout=150) as client:
        outcomes = [await load.ask(client) for _ in range(count)]
    return statistics.median(outcome.seconds for outcome in outcomes if outcome.end == "answered")


def _recovery_s(running: Server, rng: random.Random, alone_s: float) -> float:
    """Seconds until a lone request takes at most half longer than before the overload."""
    start = time.monotonic()
    while time.monotonic() - start < 60:
        if asyncio.run(_alone(running, rng, 1)) <= 1.5 * alone_s:
            return time.monotonic() - start
    return float("inf")
