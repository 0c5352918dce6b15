"""`mm serve` on Ray ends on a signal and leaves no process behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


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


def test_a_terminated_server_exits_cleanly_and_takes_its_ray_along():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "serve.cli.app", "serve", "--port", port, "--ray-cpus", "4", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 180)
        assert readable, "the server did not say that it is ready"
        assert b"ready at" in process.stdout.readline()
        below = descendants(process.pid)
        assert below
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 30
    while (left := {pid for pid in below if os.path.exists(f"/proc/{pid}")}) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
