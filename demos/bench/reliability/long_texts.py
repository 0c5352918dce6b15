"""R13: texts far longer than the context are refused by their length, cheaply, and nobody waits for them."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator

import httpx

from demos.bench.reliability.checks import Figure, Settings, at_least, at_most, check
from demos.bench.reliability.load import PATH, body, picture
from demos.bench.reliability.server import Server, server

NUM_BYTES = 32_000_000
TEXTS = {
    "words": "word " * (NUM_BYTES // 5),
    "special tokens": "<image>" * (NUM_BYTES // 7),
    "one word": "a" * NUM_BYTES,
    "Chinese": "\u6f22" * (NUM_BYTES // 3),
    "escaped line breaks": "\n" * (NUM_BYTES // 2),
}
CPU_S, MEMORY_MB = 1.0, 100.0
SETTLE_S = 1.5
"""After a large body the server gives memory back."""
LATENCY = 1.25
"""The median of others, with long texts arriving back to back, over what it is with bodies that are refused unread."""


@check("R13")
def long_texts(settings: Settings) -> Iterator[Figure]:
    """32 MB of text of several kinds, beside a picture, which must not be encoded for it."""
    rng = random.Random(f"{settings.seed} R13 long")
    with server("--in-process", "--kv-cache-gb", "0.1", "--max-body-bytes", "40000000") as running:
        bodies = {kind: _long(text, rng) for kind, text in TEXTS.items()}
        asyncio.run(_others(running, 3, rng))
        base_mb = running.reset_peak_mb()
        for kind, content in bodies.items():
            time.sleep(SETTLE_S)
            yield from _refused(running, kind, content, base_mb)
        yield from _latency(running, bodies["words"], rng, settings.size(6, 60))


def _long(text: str, rng: random.Random) -> bytes:
    parts = [
        {"type": "image_url", "image_url": {"url": picture(rng.randrange(2**32))}},
        {"type": "text", "text": text},
    ]
    request = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    return json.dumps(request, ensure_ascii=False).encode()


def _send(running: Server, content: bytes) -> httpx.Response:
    return httpx.post(running.url + PATH, content=content, timeout=60)


def _refused(running: Server, kind: str, content: bytes, base_mb: float) -> Iterator[Figure]:
    cpu_s, _ = running.cpu_s(), running.reset_peak_mb()
    response = _send(running, content)
    cpu_s, peak_mb = running.cpu_s() - cpu_s, running.peak_mb()
    code = response.json()["error"]["code"]
    is_refused = response.status_code == 400 and code == "context_length_exceeded"
    what = f"{len(content) // 10**6} MB of {kind}"
    yield at_least(f"{what}: refused by its length", float(is_refused), 1)
    yield at_most(f"{what}: CPU", cpu_s, CPU_S, "s")
    yield at_most(f"{what}: memory", peak_mb - base_mb, MEMORY_MB, "MB")


def _latency(running: Server, content: bytes, rng: random.Random, seconds: float) -> Iterator[Figure]:
    """What others wait while long texts come back to back.

    The client's own work is on the same cores, so the comparison is with as many bytes that the server only reads and
    drops: those of a path that does not exist.
    """
    dropped = asyncio.run(_beside(running, "/nothing", content, rng, seconds))
    refused = asyncio.run(_beside(running, PATH, content, rng, seconds))
    yield at_most(
        f"median of others beside long texts, of {dropped * 1000:.0f} ms beside bodies that are dropped",
        refused / dropped,
        LATENCY,
    )


async def _beside(running: Server, path: str, content: bytes, rng: random.Random, seconds: float) -> float:
    async def send() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            while True:
                await client.post(path, content=content)

    sending = asyncio.create_task(send())
    try:
        return statistics.median(await _others(running, seconds, rng))
    finally:
        sending.cancel()


async def _others(running: Server, seconds: float, rng: random.Random) -> list[float]:
    """Seconds of short requests, one after the other."""
    found: list[float] = []
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        while time.monotonic() < end:
            request = body(rng, is_stream=False, has_picture=False, num_tokens=4)
            start = time.monotonic()
            (await client.post(PATH, json=request)).raise_for_status()
            found.append(time.monotonic() - start)
    return found
