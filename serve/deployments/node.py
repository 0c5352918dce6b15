"""Ray's node in the hands of a process of ours, which ends it whatever happens to the server.

The server runs `python -m serve.deployments.node` and talks to it over its pipes. That process starts Ray's, watches
them, and says in one line where they listen or what went wrong. When the server closes the pipe, or is killed, it ends
them all. A start that fails can so be abandoned at once and tried again, which a start within the server could not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mm.errors import MmError

log = logging.getLogger(__name__)

ATTEMPTS = 5
ATTEMPT_S = 120.0
"""Longest start of a node. A start whose raylet has ended is abandoned at once."""
PAUSE_S = 2.0
"""Between two attempts, times the attempts so far."""
WATCH_S = 0.3
STOP_S = 10.0
"""How long Ray's processes may take to end by themselves."""
MAX_REASON = 200
LOGGED_ERROR = re.compile(r"\[[\d :,-]+ [EC] [^]]*\] \(\w+\) \S+:\s+")
"""What comes before the text of an error in the logs of Ray's C++ processes."""
KILL_MARGIN_S = 15.0
"""What ending processes that do not end by themselves may take, beyond `STOP_S`."""
VITAL = ("gcs_server", "raylet")


class RayDidNotStart(MmError):
    """No node came up on this machine."""


class RayEnded(MmError):
    """Ray's processes ended while the server ran."""


class Node:
    """A running node. It ends with `close`, or with this process.

    Args:
        options: Arguments of `ray.init`.
        on_end: Called from a thread when the node ends by itself.

    Raises:
        RayDidNotStart: This attempt failed.
    """

    def __init__(self, options: dict[str, Any], on_end: Callable[[], None]) -> None:
        self.mark = secrets.token_hex(8)
        self.failure: str | None = None
        self._closing = False
        self._watcher: threading.Thread | None = None
        command = [sys.executable, "-m", "serve.deployments.node", json.dumps(options)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"MM_RAY_NODE": self.mark},
            start_new_session=True,  # a signal from the terminal is for the server, which finishes its requests first
        )
        first = self._read()
        if "address" not in first:
            self.close()
            raise RayDidNotStart(first["failed"])
        self.address: str = first["address"]
        self._watcher = threading.Thread(target=self._watch, args=(on_end,), name="ray-node", daemon=True)
        self._watcher.start()

    def _read(self) -> dict[str, str]:
        """What the process says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": "the process that watches Ray ended"}

    def _watch(self, on_end: Callable[[], None]) -> None:
        said = self._read()
        if not self._closing:
            self.failure = said["failed"]
            on_end()

    def close(self) -> None:
        """End all processes of the node."""
        from serve.deployments.processes import kill_marked

        self._closing = True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S + KILL_MARGIN_S)
        kill_marked(self.mark)
        self._process.kill()
        self._process.wait()
        if self._watcher is not None:
            self._watcher.join(STOP_S)
        self._process.stdout.close()


def start(options: dict[str, Any], on_end: Callable[[], None], use: Callable[[Node], None]) -> Node:
    """A node on which `use` succeeded; what fails on a busy machine is tried again.

    Args:
        options: Arguments of `ray.init`.
        on_end: Called from a thread when the node ends by itself.
        use: Connects to the node. It may raise.

    Raises:
        RayDidNotStart: No attempt succeeded.
    """
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        if attempt > 1:
            log.warning("Ray did not start (attempt %d of %d): %s", attempt - 1, ATTEMPTS, reason)
            time.sleep(PAUSE_S * attempt)
        try:
            node = Node(options, on_end)
        except RayDidNotStart as error:
            reason = str(error)
            continue
        try:
            use(node)
            return node
        except Exception as error:  # Ray raises plain exceptions, of many kinds
            reason = node.failure or one_line(error)
            node.close()
        except BaseException:
            node.close()
            raise
    raise RayDidNotStart(
        f"Ray did not start on this machine in {ATTEMPTS} attempts; the last one: {reason}. Try again when the machine "
        "is less busy, see Ray's logs (/tmp/ray/session_latest/logs), or serve without Ray: mm serve --in-process"
    )


def one_line(error: BaseException) -> str:
    """The first line of an error's text, which Ray follows with tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


# ── the process that holds the node ───────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Start Ray with the options in the first argument, and end it when the standard input does."""
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    end = _End(answers)
    threading.Thread(target=_end_with_server, args=(end,), daemon=True).start()
    with _alone():
        threading.Thread(target=_watch_children, args=(end,), daemon=True).start()
        timer = threading.Timer(ATTEMPT_S, end.failed, (f"the node was not there after {ATTEMPT_S:.0f} s",))
        timer.daemon = True
        timer.start()
        try:
            import ray

            ray.init(address="local", **options)
        except Exception as error:
            end.failed(one_line(error))
        timer.cancel()
    end.say(address=ray.get_runtime_context().gcs_address)
    threading.Event().wait()


class _End:
    """The one way out of this process."""

    def __init__(self, answers: Any) -> None:
        self._answers, self._lock = answers, threading.Lock()

    def say(self, **what: str) -> None:
        with contextlib.suppress(OSError):
            self._answers.write(json.dumps(what) + "\n")
            self._answers.flush()

    def failed(self, reason: str) -> None:
        """Say what went wrong and end everything at once."""
        self._lock.acquire()
        self._kill()
        self.say(failed=reason)
        os._exit(1)

    def quietly(self) -> None:
        """Let Ray end its processes, and end those that are left after a while."""
        self._lock.acquire()
        stopping = threading.Thread(target=_shut_down, daemon=True)
        stopping.start()
        stopping.join(STOP_S)
        self._kill()
        os._exit(0)

    def _kill(self) -> None:
        from serve.deployments.processes import MARK, kill_marked

        kill_marked(os.environ[MARK])


def _shut_down() -> None:
    import ray

    ray.shutdown()


def _end_with_server(end: _End) -> None:
    sys.stdin.buffer.read()
    end.quietly()


def _watch_children(end: _End) -> None:
    from serve.deployments.processes import ended_children

    seen: set[str] = set()
    while True:
        if ended := ended_children(VITAL, seen):
            end.failed(f"Ray's {ended[0]} ended{_last_error(ended[0])}")
        time.sleep(WATCH_S)


def _last_error(name: str) -> str:
    """The last error in the log of one of Ray's processes, as a clause."""
    logs = Path(tempfile.gettempdir()) / "ray" / "session_latest" / "logs"
    with contextlib.suppress(OSError):
        for path in (logs / f"{name}.err", logs / f"{name}.out"):
            lines = path.read_text(errors="replace").splitlines()
            errors = [
                line for line in lines if ("] " in line and line.startswith("[") and " E " in line) or " C " in line
            ]
            if errors:
                return f": {errors[-1].split('] ', 1)[-1].strip()[:200]}"
    return ""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One node starts at a time on this machine: their start is what a busy machine fails at."""
    path = Path(tempfile.gettempdir()) / f"mm-ray-start-{os.getuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
