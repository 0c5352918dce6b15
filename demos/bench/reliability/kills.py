"""R4, R5, R6: processes that die under load."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check, noted
from demos.bench.reliability.load import PATH, Load, Outcome, body
from demos.bench.reliability.server import ON_RAY, Server, kill, left_after, server

NUM_CLIENTS = 16
STREAM_END_S = 5.0
RECOVERY_S = 30.0
KILL_EVERY_S = (1.0, 8.0)
"""Seconds between a replica's readiness and the next kill, at random."""


@check("R4")
def encoders(settings: Settings) -> Iterator[Figure]:
    """Encoders that are killed while 16 clients ask."""
    yield from _killed("Encoder", settings)


@check("R5")
def decoders(settings: Settings) -> Iterator[Figure]:
    """Decoders that are killed while 16 clients ask; `streams.py` compares what the streams say."""
    yield from _killed("Decoder", settings)


def _killed(stage: str, settings: Settings) -> Iterator[Figure]:
    rng = random.Random(f"{settings.seed} {stage}")
    with server(*ON_RAY, "--encoders", "2", "--decoders", "2") as running:
        kills, outcomes = asyncio.run(_kill_under_load(running, stage, settings.size(3, 25), rng))
        recovery_s = running.await_health(180)
    yield from kill_figures(stage, kills, outcomes)
    yield at_most(f"{stage}: all stages are there after the last kill", recovery_s, 180, "s")


async def _kill_under_load(
    running: Server, stage: str, num_kills: int, rng: random.Random
) -> tuple[list[float], list[Outcome]]:
    """Kill replicas of a stage one after the other; the times of the kills, and all requests."""
    kills: list[float] = []
    load = Load(running.url, rng, NUM_CLIENTS)
    async with load.running():
        while len(kills) < num_kills:
            await asyncio.sleep(rng.uniform(*KILL_EVERY_S))
            pids = await asyncio.to_thread(running.pids, f"ServeReplica:mm:{stage}")
            if pids and kill(rng.choice(pids)):
                kills.append(time.monotonic())
        await asyncio.sleep(5)
    return kills, load.outcomes


def kill_figures(stage: str, kills: list[float], outcomes: list[Outcome]) -> Iterator[Figure]:
    """What the clients saw."""
    ends = Counter((outcome.is_stream, outcome.end) for outcome in outcomes)
    whole = [outcome for outcome in outcomes if not outcome.is_stream]
    lags = [_since_kill(outcome, kills) for outcome in outcomes if outcome.end == "error"]
    yield at_least(f"{stage}: kills under {NUM_CLIENTS} clients", len(kills), 1)
    yield at_least(f"{stage}: requests", len(outcomes), NUM_CLIENTS)
    yield at_most(f"{stage}: requests that hung", ends[True, "hung"] + ends[False, "hung"], 0)
    unanswered = len(whole) - ends[False, "answered"]
    yield at_most(f"{stage}: whole requests of {len(whole)} that were not answered", unanswered, 0)
    broken = ends[True, "broken"] + ends[True, "refused"]
    yield at_most(f"{stage}: streams that broke off without a word", broken, 0)
    streams = f"{len(lags)} streams that ended with an error"
    yield at_most(f"{stage}: longest from a kill to the end of {streams}", max(lags, default=0.0), STREAM_END_S, "s")
    yield noted(f"{stage}: refusals with Retry-After, then asked again", sum(o.num_refusals for o in outcomes))
    yield noted(f"{stage}: slowest whole request, s", round(max((o.seconds for o in whole), default=0.0), 1))
    for outcome in [o for o in outcomes if o.end in ("broken", "hung")][:3]:
        detail = " ".join(outcome.detail.split())[-160:]
        yield Figure(what=f"{stage}: {outcome.end}", value=detail, goal="none", is_reached=False)


def _since_kill(outcome: Outcome, kills: list[float]) -> float:
    """Seconds from the last kill before the end of a stream to that end."""
    return outcome.ended - max((at for at in kills if at <= outcome.ended), default=outcome.began)


@check("R6")
def others(settings: Settings) -> Iterator[Figure]:
    """The processes beside the stages."""
    rng = random.Random(f"{settings.seed} R6")
    with server(*ON_RAY, "--ingresses", "2") as running:
        yield from asyncio.run(_without_controller(running, rng))
        for kind, title in (("proxy", "ProxyActor"), ("ingress", "ServeReplica:mm:Ingress")):
            kill(running.pids(title)[0])
            back_s = running.await_health(180)
            yield at_most(f"{kind} killed: new requests are answered after", back_s, RECOVERY_S, "s")
        pids = running.all_pids()
        kill(running.pids("raylet")[0])
        running.process.wait(60)
        said = sum("Ray ended" in line for line in running.log.splitlines())
        yield at_least("node killed: the server ends with a line that says so", said, 1)
        yield at_most("node killed: processes left after 10 s", len(left_after(pids, 10.0)), 0)


async def _without_controller(running: Server, rng: random.Random) -> list[Figure]:
    """A stream and new requests while the controller is stopped, and after it is killed."""
    long = body(rng, is_stream=True, has_picture=True, num_tokens=800)
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        stream = asyncio.create_task(client.post(PATH, json=long))
        await asyncio.sleep(0.5)
        (pid,) = running.pids("ServeController")
        kill(pid, signal.SIGSTOP)
        waits = [await _timed_health(client) for _ in range(10)]
        requests = [body(rng, is_stream=False, has_picture=True, num_tokens=4) for _ in range(5)]
        answers = [(await client.post(PATH, json=request)).status_code for request in requests]
        kill(pid)
        waits += [await _timed_health(client) for _ in range(10)]
        end = (await stream).text
    return [
        at_most("controller hung, then killed: longest wait for /health", max(waits), 1.0, "s"),
        at_least("controller hung: requests of 5 that were answered", answers.count(200), 5),
        at_least("controller killed: running streams of 1 that came to their end", end.count('"length"'), 1),
    ]


async def _timed_health(client: httpx.AsyncClient) -> float:
    start = time.monotonic()
    response = await client.get("/health")
    waited_s = time.monotonic() - start
    assert response.status_code in (200, 503)
    await asyncio.sleep(0.2)
    return waited_s
