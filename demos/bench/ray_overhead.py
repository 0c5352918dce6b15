"""What does Ray add to a request?

Run  python -m demos.bench.ray_overhead [--requests 60] [--out FILE]

Two servers run on this machine, both started by `mm serve`: one on Ray (ingress, encoder and decoder apart), one in
process. The same requests go to both in turn, so that a slow moment hits both; the answers are checked to be the
same. There are three sorts: text alone; a picture that the encoder has seen (it comes from the cache, and its features
still travel); a new picture each time. For streams the time to the first chunk is measured as well. The figure is the
median of the paired differences. One client, one request at a time, tiny model, float32, one thread per process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import PIL.Image

from demos.bench.machine import facts

START_S = 180
SORTS = ("text", "seen picture", "new picture")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(*options: str) -> Iterator[httpx.Client]:
    """A client of a server that was started for this run and is stopped after it."""
    port = free_port()
    command = [sys.executable, "-m", "serve.cli.app", "serve", "tiny", "--port", str(port), "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            await_health(client, process)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def await_health(client: httpx.Client, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit("a server did not start; run `mm serve` by hand to see why")


def picture(seed: int) -> str:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((224, 224)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(sort: str, index: int, num_tokens: int, stream: bool) -> dict:
    content: list[dict] = [{"type": "text", "text": "What is there?"}]
    if sort != "text":
        seed = 0 if sort == "seen picture" else 1 + index
        content.append({"type": "image_url", "image_url": {"url": picture(seed)}})
    request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0}
    return request | {"max_tokens": num_tokens, "ignore_eos": True, "stream": stream}


def ask(client: httpx.Client, request: dict) -> tuple[float, float, str]:
    """Seconds to the first byte of the body and to its end, and the text."""
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=request) as response:
        pieces = []
        first = 0.0
        for piece in response.iter_bytes():
            first = first or time.perf_counter() - start
            pieces.append(piece)
        total = time.perf_counter() - start
    raw = b"".join(pieces).decode()
    assert response.status_code == 200, raw
    if not request["stream"]:
        return first, total, json.loads(raw)["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    return first, total, "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def compare(local: httpx.Client, on_ray: httpx.Client, sort: str, stream: bool, requests: int, tokens: int) -> dict:
    pairs = []
    for index in range(requests + 3):
        request = body(sort, index + 1000 * stream, tokens, stream)
        order = (local, on_ray) if index % 2 else (on_ray, local)
        results = {id(client): ask(client, request) for client in order}
        assert results[id(local)][2] == results[id(on_ray)][2], "the two paths answered differently"
        if index >= 3:
            pairs.append((results[id(local)], results[id(on_ray)]))
    at = 0 if stream else 1
    return {
        "sort": sort,
        "measured": "first chunk of a stream" if stream else "whole answer",
        "in_process_ms": round(1e3 * statistics.median(a[at] for a, _ in pairs), 2),
        "ray_ms": round(1e3 * statistics.median(b[at] for _, b in pairs), 2),
        "added_ms": round(1e3 * statistics.median(b[at] - a[at] for a, b in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    with server("--in-process") as local, server() as on_ray:
        rows = [
            compare(local, on_ray, sort, stream, args.requests, args.new_tokens)
            for stream in (False, True)
            for sort in SORTS
        ]
    lines = [f"{'request':<14}{'measured':<26}{'in process':>12}{'on Ray':>10}{'Ray adds':>10}   (ms, median)"]
    lines += [
        f"{row['sort']:<14}{row['measured']:<26}{row['in_process_ms']:>12.1f}{row['ray_ms']:>10.1f}{row['added_ms']:>10.1f}"
        for row in rows
    ]
    config = {"model": "tiny", "requests": args.requests, "new_tokens": args.new_tokens, "threads": 1}
    lines += ["", json.dumps({"question": "ray overhead", "config": config, "machine": facts(), "rows": rows})]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
