"""The processes of one server: found by a mark in their environment, whoever their parent is now.

Ray's processes start others and outlive their parents. Each inherits the environment, so the mark finds exactly ours.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import ray  # noqa: F401  (it brings psutil along)

import psutil  # type: ignore[import-not-found]  # isort: skip

MARK = "MM_RAY_NODE"
"""Environment variable that all processes of one server share."""
KILL_S = 10.0
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError)


def marked(mark: str) -> Iterator[psutil.Process]:
    """Running processes with this mark, without the calling one."""
    for process in psutil.process_iter():
        with contextlib.suppress(*GONE):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                yield process


def kill_marked(mark: str) -> None:
    """End all processes with this mark, and those that they start meanwhile."""
    deadline = time.monotonic() + KILL_S
    while (found := list(marked(mark))) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(*GONE):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def listening(mark: str) -> list[tuple[str, str]]:
    """Name of the process and address of each TCP port on which marked processes listen."""
    found = []
    for process in marked(mark):
        with contextlib.suppress(*GONE):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), f"{connection.laddr.ip}:{connection.laddr.port}"))
    return found


def ended_children(names: tuple[str, ...], seen: set[str]) -> list[str]:
    """Which of the calling process's children of these names have ended. `seen` remembers those that ran."""
    running = set()
    for child in psutil.Process().children():
        with contextlib.suppress(*GONE):
            if child.status() != psutil.STATUS_ZOMBIE:
                running.add(child.name())
    seen |= running & set(names)
    return sorted(seen - running)
