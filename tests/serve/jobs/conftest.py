from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Jobs:
    """Caption jobs in processes of their own."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[3]
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.jobs.fake"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, order: object) -> int:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())

    def start(self, folder: Path, out: Path, delay_s: float = 0.0, said: Path | None = None) -> int:
        """Process id of a job over `folder`. It speaks to `said` or `<out>.said`; answers are in `<out>.log`."""
        names = {"out": str(out), "stderr": str(said or f"{out}.said"), "log": f"{out}.log"}
        return self._ask({"inputs": [str(folder)], "delay_s": delay_s, **names})

    def wait(self, pid: int) -> int:
        """Exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(self._ask(pid))

    def close(self) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.stdout.close()
        self._zygote.wait(timeout=30)


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    started = Jobs()
    yield started
    started.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    made.mkdir()
    return made


@pytest.fixture
def fill(folder: Path) -> Callable[..., None]:
    """Write files below `folder`: `fill(a="text")` makes `a.png`."""

    def write(**texts: str) -> None:
        for name, text in texts.items():
            (folder / f"{name}.png").write_text(text)

    return write


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of results."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].split(b"\n") if line]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
