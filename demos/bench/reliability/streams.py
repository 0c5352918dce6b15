"""R4, R5: streams whose decoder or encoder is killed go on, with the bytes that they would have had.

In float32: in bfloat16 the last bits of a sum, and with them a text, also depend on what else is in a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check, noted
from demos.bench.reliability.load import ANSWER_S, PATH, body
from demos.bench.reliability.server import ON_RAY, Server, kill, server

NUM_STREAMS = 16
KILL_AFTER_S = (1.0, 6.0)
"""Seconds from the time at which enough replicas run to the next kill, at random."""
CI_S = 90.0
FORM = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 12}},
    "required": ["words"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 3},
    "n = 2": {"temperature": 1.0, "seed": 5, "n": 2},
    "schema": {
        "temperature": 1.0,
        "seed": 7,
        "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": FORM}},
    },
    "drafted": {"speculation": {"drafter": "copy"}},
    "reduced": {"vision": {"reducer": "divprune", "keep_ratio": 0.25}},
    "reduced in the decoder": {"vision": {"reducer": "fastv:keep_ratio=0.5"}},
}


@dataclass
class Streams:
    """Clients that each send one stream after the other, and how the streams ended.

    Args:
        requests: Kind and body of each request that there is.
        expected: What each of them gives when nobody is killed.
    """

    url: str
    requests: list[tuple[str, dict[str, Any]]]
    expected: list[dict[int, str]] = field(default_factory=list)
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    num_refusals: int = 0

    async def learn(self) -> None:
        """Ask everything once, undisturbed."""
        async with httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S) as client:
            for _, request in self.requests:
                response = await client.post(PATH, json=request)
                found = contents(response.text)
                if isinstance(found, str):
                    raise RuntimeError(f"undisturbed: {found}")
                self.expected.append(found)

    @contextlib.asynccontextmanager
    async def running(self, rng: random.Random) -> Any:
        stop = asyncio.Event()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=ANSWER_S, limits=limits) as client:
            seeds = [rng.randrange(1 << 30) for _ in range(NUM_STREAMS)]
            tasks = [asyncio.create_task(self._client(client, random.Random(seed), stop)) for seed in seeds]
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def _client(self, client: httpx.AsyncClient, rng: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            index = rng.randrange(len(self.requests))
            kind, request = self.requests[index]
            began = time.monotonic()
            end, detail = await self._ask(client, request, self.expected[index])
            if end == "refused":
                self.num_refusals += 1
                await asyncio.sleep(1.0)
                continue
            self.ends[kind, end] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if end != "same":
                self.details.append(f"{kind}: {end}: {detail[:200]}")

    async def _ask(
        self, client: httpx.AsyncClient, request: dict[str, Any], expected: dict[int, str]
    ) -> tuple[str, str]:
        try:
            async with asyncio.timeout(ANSWER_S), client.stream("POST", PATH, json=request) as response:
                text = (await response.aread()).decode()
        except (TimeoutError, httpx.TimeoutException):
            return "hung", "no end"
        except httpx.HTTPError as error:
            return "lost", f"{type(error).__name__}: {error}"
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            return "refused", ""
        found = contents(text)
        if isinstance(found, str):
            return "lost", found
        if found == expected:
            return "same", ""
        different = next(choice for choice in expected if found.get(choice) != expected[choice])
        return "different", f"{found.get(different, '')[-120:]} instead of {expected[different][-120:]}"


def contents(text: str) -> dict[int, str] | str:
    """All that a stream says of each choice, as JSON; or what is wrong with it."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        return f"no end: {text[-200:]}"
    found: dict[int, list[Any]] = {}
    for chunk in map(json.loads, lines[:-1]):
        if "error" in chunk:
            return json.dumps(chunk["error"])
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    return {index: json.dumps(choices) for index, choices in found.items()}


def requests(rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """One of each kind, with and without a picture."""
    found = []
    for kind, fields in KINDS.items():
        for has_picture in (True,) if kind.startswith("reduced") else (False, True):
            plain = body(rng, is_stream=True, has_picture=has_picture, num_tokens=rng.randint(150, 300))
            found.append((kind, plain | fields))
    return found


@check("R5")
def decoders(settings: Settings) -> Iterator[Figure]:
    """Decoders that are killed under 16 streams."""
    yield from _killed("Decoder", settings)


@check("R4")
def encoders(settings: Settings) -> Iterator[Figure]:
    """Encoders that are killed under 16 streams."""
    yield from _killed("Encoder", settings)


def _killed(stage: str, settings: Settings) -> Iterator[Figure]:
    rng = random.Random(f"{settings.seed} streams {stage}")
    counts = ("--encoders", "2", "--decoders", "2", "--allow-drafter", "copy", "--dtype", "float32")
    with server(*ON_RAY, *counts) as running:
        streams = Streams(running.url, requests(rng))
        num_kills = asyncio.run(_kill_under_streams(running, streams, stage, settings, rng))
    yield from figures(stage, num_kills, streams)


async def _kill_under_streams(
    running: Server, streams: Streams, stage: str, settings: Settings, rng: random.Random
) -> int:
    """Kill a replica whenever two have run for a while; how many were killed."""
    await streams.learn()
    most, num_kills, end = settings.size(10, 30), 0, time.monotonic() + settings.size(1, 24) * CI_S
    async with streams.running(rng):
        while num_kills < most and time.monotonic() < end:
            await asyncio.sleep(rng.uniform(*KILL_AFTER_S))
            pids = await asyncio.to_thread(running.pids, f"ServeReplica:mm:{stage}")
            if len(pids) >= 2 or (pids and rng.random() < 0.2):
                num_kills += kill(rng.choice(pids))
    return num_kills


def figures(stage: str, num_kills: int, streams: Streams) -> Iterator[Figure]:
    """What the clients saw."""
    ends = Counter[str]()
    for (_, end), count in streams.ends.items():
        ends[end] += count
    yield at_least(f"{stage}: kills under {NUM_STREAMS} streams", num_kills, 1)
    yield at_least(f"{stage}: streams", ends.total(), NUM_STREAMS)
    for end, what in (("lost", "lost"), ("hung", "that hung"), ("different", "with other bytes than undisturbed")):
        yield at_most(f"{stage}: streams {what}", ends[end], 0)
    yield noted(f"{stage}: refusals with Retry-After, then asked again", streams.num_refusals)
    yield noted(f"{stage}: slowest stream, s", round(streams.slowest_s, 1))
    for detail in streams.details[:5]:
        yield Figure(what=f"{stage}: a stream", value=" ".join(detail.split()), goal="none", is_reached=False)
