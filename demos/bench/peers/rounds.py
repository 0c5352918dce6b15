"""All engines take turns: every round asks each of them the same, in an order that moves on by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demos.bench.peers.environments import Unavailable, last_words
from demos.bench.peers.prepare import write_pictures

ROOT = Path(__file__).parents[3]
QUESTION = "Describe the picture."
SECOND = "How many shapes are there?"
FIRST_TOKENS = 1


@dataclass(frozen=True)
class Plan:
    """How much is asked.

    Attributes:
        rounds: Timed rounds; one more warms up.
        starts: Timed starts of each engine; one more fills the page cache.
        tokens: Tokens of every answer.
        at_once: Requests that are there together.
        side: Pixels of a picture's side.
    """

    rounds: int
    starts: int
    tokens: int
    at_once: int
    side: int


@dataclass
class Measured:
    """What one engine took, one figure for each round, and what it answered.

    Attributes:
        cpu, wall: Seconds by name; under "many", tokens per second.
        answers: Tokens of each single request.
        many: Tokens of the requests that were there together, of every round.
    """

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)
    many: list[list[int]] = field(default_factory=list)

    def add(self, found: dict[str, Any], rename: dict[str, str] | None = None) -> None:
        """Keep the times of an answer; `rename` says under which names, and leaves the others out."""
        for clock, into in (("cpu", self.cpu), ("wall", self.wall)):
            for name, value in found[clock].items():
                if rename is None or name in rename:
                    into.setdefault(rename[name] if rename else name, []).append(value)


class Child:
    """An engine's process.

    Raises:
        Unavailable: The engine cannot start, or ended.
    """

    def __init__(self, name: str, python: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        threads = str(settings["threads"])
        keep = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | keep
        command = [str(python), "-m", "demos.bench.peers.child", name, str(folder), json.dumps(settings)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        try:
            self.ready = self._read()
        except Unavailable:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise Unavailable(f"its process ended with status {self.process.returncode}: {last_words(self.log.read())}")
        found = json.loads(line)
        if "error" in found:
            raise Unavailable(last_words(found["error"]))
        return found

    def do(self, kind: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"do": kind, **arguments}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


@dataclass(frozen=True)
class Entry:
    """An engine, its Python and the folder that it reads."""

    name: str
    python: Path
    folder: Path

    def start(self, settings: dict[str, Any]) -> Child:
        return Child(self.name, self.python, self.folder, settings)


class Rounds:
    """Runs the plan. An engine that fails is out from then on, and `failed` says why.

    Attributes:
        measured: By the engine's name, without those that failed.
        failed: Why an engine is out.
    """

    def __init__(self, entries: Sequence[Entry], settings: dict[str, Any], plan: Plan, folder: Path) -> None:
        self.entries, self.settings, self.plan, self.folder = list(entries), settings, plan, folder
        self.measured = {entry.name: Measured() for entry in entries}
        self.failed: dict[str, str] = {}
        self._pictures = 0

    def run(self) -> None:
        for number in range(self.plan.starts + 1):
            picture = str(self._draw(1)[0])
            for entry in self._turn(number):
                self._guarded(entry, lambda e=entry, n=number, p=picture: self._start(e, p, n > 0))
        children: dict[str, Child] = {}
        try:
            for entry in self._turn(0):
                self._guarded(entry, lambda e=entry: children.__setitem__(e.name, e.start(self.settings)))
            for number in range(self.plan.rounds + 1):
                self._round(children, number)
                print(f"round {number} of {self.plan.rounds}", file=sys.stderr, flush=True)
        finally:
            for child in children.values():
                child.close()

    def _turn(self, number: int) -> list[Entry]:
        """Those that still run, in the order of this round."""
        left = [entry for entry in self.entries if entry.name not in self.failed]
        at = number % max(1, len(left))
        return left[at:] + left[:at]

    def _guarded(self, entry: Entry, work: Any) -> None:
        try:
            work()
        except Unavailable as error:
            self.failed[entry.name] = str(error)
            del self.measured[entry.name]

    def _draw(self, number: int) -> list[Path]:
        """New pictures, so that no engine finds them in a cache."""
        self._pictures += number
        return write_pictures(self.folder, number, self._pictures - number, self.plan.side)

    def _start(self, entry: Entry, picture: str, is_timed: bool) -> None:
        child = entry.start(self.settings)
        try:
            child.do("ask", picture=picture, question=QUESTION, num_tokens=FIRST_TOKENS)
            spent = child.do("spent")
        finally:
            child.close()
        if is_timed:
            into = self.measured[entry.name].cpu
            into.setdefault("ready", []).append(child.ready["cpu_s"])
            into.setdefault("start", []).append(spent["cpu_s"])
            into.setdefault("resident", []).append(spent["resident_mb"])

    def _round(self, children: dict[str, Child], number: int) -> None:
        """Each case for all engines, before the next case."""
        alone, (*together,) = str(self._draw(1)[0]), map(str, self._draw(self.plan.at_once))
        tokens = self.plan.tokens

        def one(child: Child, into: Measured) -> None:
            found = child.do("ask", picture=alone, question=QUESTION, num_tokens=tokens)
            into.add(found)
            into.answers.append(found["ids"])

        def again(child: Child, into: Measured) -> None:
            found = child.do("ask", picture=alone, question=SECOND, num_tokens=FIRST_TOKENS)
            into.add(found, {"first": "second"})

        def many(child: Child, into: Measured) -> None:
            found = child.do("ask_all", pictures=together, question=QUESTION, num_tokens=tokens)
            into.add(found)
            into.many += found["ids"]

        for case in (one, again, many):
            for entry in self._turn(number):
                into = self.measured[entry.name] if number else Measured()
                self._guarded(entry, lambda c=case, n=entry.name, i=into: c(children[n], i))
