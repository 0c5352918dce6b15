"""Processes that decode one clip each and can be killed.

A spare child is kept that has imported its decoder, so a request need not wait for an interpreter to start (about
0.2 s). When it is taken, the next spare is started. A child ends when its pipe is closed, so it cannot outlive this
process.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from mm.media.wire import OUT_OF_MEMORY_STATUS

CHILD_COMMAND = (sys.executable, "-m", "mm.media.video_child")
LIMIT_STATUSES = frozenset({-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM, OUT_OF_MEMORY_STATUS})


class Child:
    """A running video child and its pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_child_environment(),
            start_new_session=True,  # a process group of its own, which can be killed as a whole
        )
        self.pipe_in, self.pipe_out = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        self.hit_deadline = False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the child and everything it started. Safe to call from another thread, and again."""
        # The child is not reaped yet, so its id is its own. `deadline` ends its timer before `close` is called.
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Kill and reap the child, close the pipes. Returns the exit status, which is negative for a signal."""
        self.kill()
        status = self.process.wait()
        for pipe in (self.pipe_in, self.pipe_out):
            try:
                pipe.close()
            except OSError:  # there are unsent bytes, and the child is gone
                continue
        return status

    @contextmanager
    def deadline(self, seconds: float) -> Generator[None]:
        """Kill the child when the time is over. This also ends a blocked read from it or write to it."""
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        self.hit_deadline = True
        self.kill()


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


def _child_environment() -> dict[str, str]:
    """The variables that Python needs to find the same packages, and no others, since they may hold secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    root = str(Path(__file__).parents[2])
    # The thread pool of a math library would reserve memory, which counts towards the limit.
    return {**kept, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), "OPENBLAS_NUM_THREADS": "1"}
