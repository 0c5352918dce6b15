"""`mm serve` ends when it is asked to: running streams finish first, and no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

NUM_TOKENS = 300
"""Long enough that the signal comes in the middle of the stream."""


def descendants(pid: int) -> set[int]:
    """Process ids below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found - {pid}


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that is ready, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "serve.cli.app", "serve", "--port", port, "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 600)
        assert readable, "the server did not say that it is ready"
        assert b"ready at" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def stream_and_stop(process: subprocess.Popen[bytes], url: str) -> list[dict]:
    """Send SIGTERM after the first chunks of a stream; all its chunks."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks: list[dict] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
            if len(chunks) == 3:
                process.send_signal(signal.SIGTERM)
    return chunks


def await_end(pids: set[int], timeout_s: float = 30.0) -> set[int]:
    """The processes that are left after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := {pid for pid in pids if os.path.exists(f"/proc/{pid}")}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


OPTIONS = [
    pytest.param(["--in-process"], id="in process"),
    pytest.param(["--ray-cpus", "4"], id="ray", marks=pytest.mark.ray),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_running_stream_finishes_before_a_terminated_server_exits(options):
    with server(*options) as (process, url):
        below = descendants(process.pid)
        chunks = stream_and_stop(process, url)
        assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == NUM_TOKENS
        assert process.wait(60) == 0
    assert not await_end(below)


@pytest.mark.ray
def test_a_server_that_is_killed_leaves_no_process():
    with server("--ray-cpus", "4") as (process, _):
        below = descendants(process.pid)
        assert len(below) > 5
        process.kill()
        process.wait()
        assert not await_end(below)
