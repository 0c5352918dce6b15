"""R9: ten times as many requests as the server can answer."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator

import httpx
import numpy as np

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check, noted
from demos.bench.reliability.load import Load, Outcome
from demos.bench.reliability.server import Server, server

BOUNDS = ("--max-num-seqs", "8", "--max-waiting", "8", "--max-queued-requests", "8")
NUM_FULL = 16
"""Clients that keep the server busy without a refusal."""
TOKENS = (20, 40)
TIMES = 10
REFUSAL_S = 0.1
GOODPUT = 0.9
RECOVERY_S = 10.0


@check("R9")
def ten_times(settings: Settings) -> Iterator[Figure]:
    """Requests arrive at ten times the rate that the server reached with as many clients as it takes."""
    rng = random.Random(f"{settings.seed} R9")
    seconds = settings.size(15, 120)
    with server("--in-process", "--kv-cache-gb", "0.1", *BOUNDS) as running:
        asyncio.run(_closed(running, 3, rng))
        alone_s = asyncio.run(_alone(running, rng, 5))
        peak = _rate(asyncio.run(_closed(running, seconds, rng)), seconds)
        outcomes = asyncio.run(_open(running, seconds, TIMES * peak, rng))
        recovery_s = _recovery_s(running, rng, alone_s)
    refused = [outcome.seconds for outcome in outcomes if outcome.end == "refused"]
    others = [outcome for outcome in outcomes if outcome.end not in ("refused", "answered")]
    yield noted("peak, answers per second", peak)
    yield noted(f"requests offered in {seconds} s", len(outcomes))
    yield at_least("refused requests", len(refused), 1)
    yield at_most(
        "refusals: 99 % are sent within", float(np.percentile(refused, 99)) if refused else 0.0, REFUSAL_S, "s"
    )
    yield at_most("accepted requests that failed", len(others), 0)
    yield at_least("goodput at ten times the peak rate, of the peak", _rate(outcomes, seconds) / peak, GOODPUT)
    yield at_most("a lone request is as fast as before after", recovery_s, RECOVERY_S, "s")


async def _closed(running: Server, seconds: float, rng: random.Random) -> list[Outcome]:
    """As many clients as the server takes; what they had answered within the time."""
    load = Load(running.url, rng, NUM_FULL, TOKENS, retries=False)
    async with load.running():
        await asyncio.sleep(seconds)
        return list(load.outcomes)


async def _open(running: Server, seconds: float, rate: float, rng: random.Random) -> list[Outcome]:
    """Requests at random times, whether or not earlier ones were answered."""
    load = Load(running.url, rng, 0, TOKENS, retries=False)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=running.url, timeout=150, limits=limits) as client:
        tasks = []
        while time.monotonic() - start < seconds:
            tasks.append(asyncio.create_task(load.ask(client)))
            await asyncio.sleep(rng.expovariate(rate))
        outcomes = await asyncio.gather(*tasks)
    in_time = start + seconds
    return [outcome for outcome in outcomes if outcome.end != "answered" or outcome.ended <= in_time]


def _rate(outcomes: list[Outcome], seconds: float) -> float:
    return sum(outcome.end == "answered" for outcome in outcomes) / seconds


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
