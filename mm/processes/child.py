"""A child process with pipes, in a process group of its own. It ends when its pipe is closed, so with its parent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


class Child:
    """A running child and its pipes.

    Args:
        keep: Beginnings of the names of further environment variables that the child gets.
        shows_errors: Its stderr is this process's; else what it writes there is lost.
    """

    def __init__(self, command: Sequence[str], *, keep: tuple[str, ...] = (), shows_errors: bool = False) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if shows_errors else subprocess.DEVNULL,
            env=child_environment() | {name: value for name, value in os.environ.items() if name.startswith(keep)},
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


def child_environment() -> dict[str, str]:
    """The variables that Python needs to find the same packages, and no others, since they may hold secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    root = str(Path(__file__).parents[2])
    # The thread pool of a math library would reserve memory, which counts towards the limit.
    return {**kept, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), "OPENBLAS_NUM_THREADS": "1"}


def lower_limit(limit: int, soft: int, hard: int) -> None:
    """Set a limit of this process, or keep the inherited one if that is lower."""
    inherited = resource.getrlimit(limit)[1]
    if inherited != resource.RLIM_INFINITY:
        soft, hard = min(soft, inherited), min(hard, inherited)
    resource.setrlimit(limit, (soft, hard))


def private_stdout() -> BinaryIO:
    """The pipe under another descriptor, so that a library that prints to stdout cannot break the protocol."""
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe_out
