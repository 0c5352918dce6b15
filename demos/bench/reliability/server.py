"""A server of the campaign: `mm serve` as its users start it, and the processes that it consists of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import httpx

from demos.bench.reliability.processes import cpu_s, family, peak_mb, reset_peak, resident_mb

START_S = 600
STOP_S = 120
ON_RAY = ("--ray-cpus", "6", "--object-store-bytes", "150000000", "--kv-cache-gb", "0.1")
GAUGE = re.compile(r"^([a-z_:]+){[^}]*} (\S+)$", re.MULTILINE)


class Server:
    """A running server.

    Attributes:
        url: Its address.
        process: The process that was started.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log_path: str) -> None:
        self.url, self.process, self._log_path = url, process, log_path

    @property
    def log(self) -> str:
        """What it wrote to its standard error."""
        with open(self._log_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def pids(self, kind: str) -> list[int]:
        """Running processes of the server by a part of their title; replicas that are still starting are left out.

        Args:
            kind: "Encoder", "Decoder", "Ingress", "ServeController", "ProxyActor", "raylet" or "gcs_server".
        """
        from serve.deployments.processes import GONE

        found = []
        for process in self._processes():
            with contextlib.suppress(*GONE):
                title = " ".join(process.cmdline()[:1]).split("/")[-1]
                if kind in title and "__init__" not in title and process.status() != "zombie":
                    found.append(process.pid)
        return found

    def _processes(self) -> list:
        import ray  # noqa: F401  (it brings psutil along)
        import psutil  # type: ignore[import-not-found]  # isort: skip

        return psutil.Process(self.process.pid).children(recursive=True)

    def all_pids(self) -> set[int]:
        return {process.pid for process in self._processes()}

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(map(cpu_s, family(self.process.pid)))

    def reset_peak_mb(self) -> float:
        """Begin a new measurement of the peak. Returns the resident memory of all its processes."""
        pids = family(self.process.pid)
        for pid in pids:
            reset_peak(pid)
        return sum(map(resident_mb, pids))

    def peak_mb(self) -> float:
        """The peaks of all its processes since then, added."""
        return sum(map(peak_mb, family(self.process.pid)))

    def gauges(self) -> dict[str, float]:
        """The figures of `/metrics`; of those with several labels the last one."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {name: float(value) for name, value in GAUGE.findall(text)}

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def await_health(self, timeout_s: float = START_S) -> float:
        """Seconds until `/health` is 200; infinity if it is not in time."""
        start = time.monotonic()
        while time.monotonic() - start < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.strip().splitlines()[-1:]}")
            if self.is_healthy():
                return time.monotonic() - start
            time.sleep(0.2)
        return float("inf")


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal to a process of a server; whether it was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def left_after(pids: set[int], timeout_s: float) -> set[int]:
    """Processes of a server that are still there after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := {pid for pid in pids if os.path.exists(f"/proc/{pid}")}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@contextlib.contextmanager
def server(*options: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server of the shipped model that is ready, and is stopped afterwards.

    Args:
        env: Variables beside those of this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve.cli.app", "serve", "tiny", "--port", str(port), "--threads", "1", *options]
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **(env or {})})
        running = Server(f"http://127.0.0.1:{port}", process, log.name)
        try:
            if running.await_health() == float("inf"):
                raise RuntimeError("the server was not ready in time")
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
