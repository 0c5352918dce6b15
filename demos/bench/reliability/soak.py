"""Does the memory of a server keep rising under mixed requests? (R11)

Run  python -m demos.bench.reliability.soak [--requests 3000] [--warm-up 1000] [--seed N] [--url URL --pid PID]

Starts `mm serve --in-process tiny`, or watches the process PID behind a running server. Eight clients send pictures
never sent before, pictures sent before, clips, long and short texts and JSON schemas, through six reducers. Of the
requests 20 % are cut while they stream, and 5 % carry a damaged picture. The resident memory of the server and its
children is read at every 250 requests. Prints one line of JSON per reading, and the verdict: the growth after the
warm-up, which should stay under 2 %, and the gauges that have to be back at 0.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import PIL.Image
import PIL.ImageDraw

from demos.bench.reliability.checks import Figure, Settings, at_most, check, noted
from demos.bench.reliability.processes import family, num_files, num_threads, resident_mb

CLIENTS = 8
REDUCERS = ("none", "divprune:keep_ratio=0.25", "visionzip:keep_ratio=0.2", "fastv", "tome", "cdpruner:keep_ratio=0.3")
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}}},
}
GAUGES = ("mm:num_requests_in_flight", "vllm:num_requests_running", "vllm:num_requests_waiting")
WORDS = ("what", "color", "is", "the", "large", "round", "shape", "left", "of", "a", "word", "how", "many", "squares")
EVERY = 250
BOUNDED = ("--threads=1", "--kv-cache-gb=0.1", "--cache-bytes=16000000")
GOAL = 0.02


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def picture(rng: random.Random) -> bytes:
    """A drawn picture of random size and format."""
    size = rng.randint(48, 900), rng.randint(48, 900)
    image = PIL.Image.new("RGB", size, tuple(rng.randbytes(3)))
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randint(0, size[0]), rng.randint(0, size[1])
        draw.ellipse((x, y, x + rng.randint(5, 200), y + rng.randint(5, 200)), fill=tuple(rng.randbytes(3)))
    file = io.BytesIO()
    image.save(file, rng.choice(("PNG", "JPEG", "WEBP")))
    return file.getvalue()


def clip(rng: random.Random) -> bytes:
    """A short H.264 clip of random size."""
    width, height = 16 * rng.randint(6, 20), 16 * rng.randint(6, 20)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w") as container:
            stream = container.add_stream("libx264", rate=8, width=width, height=height, pix_fmt="yuv420p")
            for _ in range(rng.randint(4, 24)):
                pixels = np.full((height, width, 3), list(rng.randbytes(3)), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
        return Path(file.name).read_bytes()


class Requests:
    """The bodies of the soak, by seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.earlier: list[bytes] = []

    def next(self) -> tuple[dict[str, Any], str]:
        """A body and its kind: whole, cut or damaged."""
        rng = self.rng
        text = " ".join(rng.choices(WORDS, k=rng.choice((3, 8, 8, 40, 400))))
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        what, kind = rng.random(), "whole"
        if what < 0.05:
            data = picture(rng)
            parts.append(_media("image", data[: len(data) // 2], "png"))
            kind = "damaged"
        elif what < 0.15:
            parts.append(_media("video", clip(rng), "mp4"))
        elif what < 0.75:
            parts += [_media("image", self._picture(), "png") for _ in range(rng.choice((1, 1, 1, 3)))]
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": rng.choice((1, 8, 32, 96)),
            "stream": rng.random() < 0.5,
            "temperature": rng.choice((0, 0, 1)),
        }
        if len(parts) > 1:
            body["vision"] = {"reducer": rng.choice(REDUCERS)}
        if rng.random() < 0.05:
            body["response_format"] = SCHEMA
        if kind == "whole" and rng.random() < 0.2:
            body |= {"stream": True, "max_tokens": 96}
            kind = "cut"
        return body, kind

    def _picture(self) -> bytes:
        if self.earlier and self.rng.random() < 0.2:
            return self.rng.choice(self.earlier)
        new = picture(self.rng)
        self.earlier = [*self.earlier[-20:], new]
        return new


def _media(kind: str, data: bytes, subtype: str) -> dict[str, Any]:
    url = f"data:{kind}/{subtype};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


async def send(client: httpx.AsyncClient, body: dict[str, Any], kind: str, seen: Counter[str]) -> None:
    """Send one request; a request to be cut is left after its first bytes."""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        seen[f"{kind} {response.status_code}"] += 1
        if kind == "cut":
            async for _ in response.aiter_bytes():
                break
        else:
            await response.aread()


# ── the server ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def server(options: list[str]) -> AsyncIterator[tuple[str, int]]:
    """A server of its own: its address and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serve.cli.app", "serve", "tiny", "--in-process", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        break
                await asyncio.sleep(0.5)
            else:
                raise SystemExit("the server did not start")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


async def soak(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send the requests and return the verdict."""
    requests, seen, readings = Requests(args.seed), Counter[str](), {}
    number, start = 0, time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            nonlocal number
            while number < args.requests:
                number += 1
                own = number
                await send(client, *requests.next(), seen)
                if own % args.every == 0:
                    readings[own] = round(sum(resident_mb(one) for one in family(pid)), 1)
                    reading = {"requests": own, "resident_mb": readings[own], "server_mb": round(resident_mb(pid), 1)}
                    reading |= {"files": num_files(pid), "threads": num_threads(pid)}
                    print(json.dumps(reading | {"s": round(time.perf_counter() - start)}), flush=True)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        await asyncio.sleep(2)
        metrics = (await client.get("/metrics")).text
    gauges = {name: [float(value) for value in re.findall(rf"^{name}{{.*?}} (\S+)$", metrics, re.M)] for name in GAUGES}
    warm = min(value for at, value in readings.items() if at >= args.warm_up)
    growth = readings[max(readings)] / readings[min(at for at in readings if at >= args.warm_up)] - 1
    errors = sum(count for name, count in seen.items() if " 5" in name)
    return {
        "figure": "growth of resident memory after the warm-up",
        "growth": round(growth, 4),
        "goal": GOAL,
        "lowest_mb": warm,
        "last_mb": readings[max(readings)],
        "gauges": gauges,
        "answers": dict(sorted(seen.items())),
        "errors_5xx": errors,
        "verdict": "met" if growth < GOAL and not errors and not any(sum(v) for v in gauges.values()) else "missed",
    }


@check("R11")
def mixed_requests(settings: Settings) -> Iterator[Figure]:
    """The soak, with a feature cache that is full after the warm-up: until then its growth is no leak."""
    size = {
        "requests": settings.size(600, 3000),
        "warm_up": settings.size(300, 1000),
        "every": settings.size(100, EVERY),
    }
    args = argparse.Namespace(**size, seed=settings.seed, url=None, pid=None, option=list(BOUNDED))
    verdict = asyncio.run(_on_a_server(args))
    gauges = sum(sum(values) for values in verdict["gauges"].values())
    yield noted(f"resident memory after {size['requests']} requests, MB", verdict["last_mb"])
    yield at_most("growth of resident memory after the warm-up", 100 * verdict["growth"], 100 * GOAL, "%")
    yield at_most("server errors", verdict["errors_5xx"], 0)
    yield at_most("requests that the gauges still count", gauges, 0)


async def _on_a_server(args: argparse.Namespace) -> dict[str, Any]:
    async with server(args.option) as (url, pid):
        return await soak(url, pid, args)


async def run(args: argparse.Namespace) -> None:
    if args.url:
        print(json.dumps(await soak(args.url, args.pid, args)))
        return
    print(json.dumps(await _on_a_server(args)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--warm-up", type=int, default=1000, help="requests after which memory has to stay")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--every", type=int, default=EVERY, help="requests between two readings")
    parser.add_argument("--url", help="of a running server")
    parser.add_argument("--pid", type=int, help="its process id")
    parser.add_argument("--option", action="append", default=[], help="a further option of mm serve; repeat")
    args = parser.parse_args()
    if bool(args.url) != bool(args.pid):
        parser.error("--url and --pid belong together")
    print(json.dumps({"seed": args.seed}))
    asyncio.run(run(args))


if __name__ == "__main__":
    main()
