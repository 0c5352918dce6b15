"""One engine in a process of its own, which does what each line of its input says and answers with a line of JSON.

Run by `demos.bench.peers`, with the Python of the engine's environment. It imports nothing but that engine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """What each module of `demos.bench.peers.engines` gives as `Engine`."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None: ...

    def ask(self, picture: str, question: str, num_tokens: int, stamp: Callable[[], None]) -> list[int]:
        """Answer greedily with exactly `num_tokens` tokens; calls `stamp` when each of them is there."""
        ...

    def ask_all(self, pictures: list[str], question: str, num_tokens: int) -> list[list[int]]:
        """The same question about each picture, all at once."""
        ...


def family_of(pid: int) -> list[int]:
    """The process and all processes below it."""
    found = [pid]
    for one in found:
        for listed in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(text) for text in listed.read_text().split()]
    return found


def cpu_s() -> float:
    """Processor time of this process with all its threads, and of the processes below it, ended or not."""
    times = os.times()
    spent = time.process_time() + times.children_user + times.children_system
    for pid in family_of(os.getpid())[1:]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return spent


def resident_mb() -> float:
    """Resident memory of this process and of those below it, in MB."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family_of(os.getpid())]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def ask(engine: Engine, picture: str, question: str, num_tokens: int) -> dict[str, Any]:
    stamps: list[tuple[float, float]] = []
    start = cpu_s(), time.perf_counter()
    ids = engine.ask(picture, question, num_tokens, lambda: stamps.append((cpu_s(), time.perf_counter())))
    end = cpu_s(), time.perf_counter()
    check(ids, num_tokens)
    found: dict[str, Any] = {"ids": ids}
    for index, clock in enumerate(("cpu", "wall")):
        found[clock] = {"first": stamps[0][index] - start[index], "whole": end[index] - start[index]}
        if num_tokens > 1:
            found[clock]["token"] = (stamps[-1][index] - stamps[0][index]) / (num_tokens - 1)
    return found


def ask_all(engine: Engine, pictures: list[str], question: str, num_tokens: int) -> dict[str, Any]:
    start = cpu_s(), time.perf_counter()
    answers = engine.ask_all(pictures, question, num_tokens)
    spent = cpu_s() - start[0], time.perf_counter() - start[1]
    for ids in answers:
        check(ids, num_tokens)
    rates = [len(pictures) * num_tokens / one for one in spent]
    return {"ids": answers, "cpu": {"many": rates[0]}, "wall": {"many": rates[1]}}


def check(ids: list[int], num_tokens: int) -> None:
    if len(ids) != num_tokens:
        raise ValueError(f"an answer has {len(ids)} tokens; {num_tokens} were asked for, so the work is not the same")


def serve(engine: Engine, commands: TextIO, answers: TextIO) -> None:
    """Answer each line until there are no more."""
    print(json.dumps({"ready": True, "cpu_s": cpu_s()}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        kind = command.pop("do")
        if kind == "spent":
            found = {"cpu_s": cpu_s(), "resident_mb": resident_mb()}
        else:
            found = {"ask": ask, "ask_all": ask_all}[kind](engine, **command)
        print(json.dumps(found), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder")
    parser.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    try:
        module = importlib.import_module(f"demos.bench.peers.engines.{args.engine}")
        serve(module.Engine(args.folder, args.settings), sys.stdin, answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        raise


if __name__ == "__main__":
    main()
