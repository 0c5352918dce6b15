"""Processes that decode one clip each and can be killed.

A spare child is kept that has imported its decoder, so a request need not wait for an interpreter to start (about
0.2 s). When it is taken, the next spare is started. A child ends when its pipe is closed, so it cannot outlive this
process.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence

from mm.processes.child import Child
from mm.processes.wire import OUT_OF_MEMORY_STATUS

CHILD_COMMAND = (sys.executable, "-m", "mm.media.video_child")
LIMIT_STATUSES = frozenset({-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM, OUT_OF_MEMORY_STATUS})


class ChildPool:
    """Starts children and keeps one spare. Thread-safe.

    Args:
        command: The command that starts a child.
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._spare: Child | None = None

    def take(self) -> Child:
        """A child that has not decoded anything yet. The caller closes it. The next spare starts meanwhile."""
        with self._lock:
            spare, self._spare = self._spare, Child(self._command)
        if spare is not None and spare.is_alive:
            return spare
        if spare is not None:
            spare.close()
        return Child(self._command)

    def refill(self) -> None:
        """Start a spare if there is none."""
        with self._lock:
            self._spare = self._spare or Child(self._command)

    def close(self) -> None:
        """End the spare."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def forget(self) -> None:
        """Drop the spare without ending it. After a fork it belongs to the parent process."""
        self._lock = threading.Lock()
        self._spare = None


POOL = ChildPool()
"""The pool of this process."""

atexit.register(POOL.close)
os.register_at_fork(after_in_child=POOL.forget)
