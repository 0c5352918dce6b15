"""How much CPU time does a request take here, against an earlier commit?

Run  python -m demos.bench.against_commit --base FOLDER [--pairs 10] [--rounds 4] [--case "decode, batch 8"]

FOLDER is a checkout of the earlier commit with its own virtual environment in .venv. A pair is one process of each
side, with one compute thread each. Its two processes take turns case by case, in an order that alternates, so that
what else the machine does falls on both alike. Where a process's memory happens to lie makes it up to 10 % faster or
slower for as long as it lives, so each pair is started anew: a figure is the median over the pairs of the median ratio
of a pair's rounds (this commit / the other), with the 95 % interval of that median. Answers are compared token by
token. Run it with this checkout as FOLDER for a control: the ratio has to be 1 within its interval.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PICTURE = "demos/samples/many_shapes.png"
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "prefix_caching": False, "cache_bytes": 0}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


# ── one side ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_cases() -> dict[str, Callable[[], object]]:
    """The cases by name; each returns what it answered. Only names that earlier commits have too are used."""
    import mm

    try:
        from mm.config import SpeculationLimits
    except ModuleNotFoundError:
        from mm.core.config import SpeculationLimits  # type: ignore[import-not-found]  # before the packages moved

    model = mm.load("tiny", **SETTINGS)
    drafting = mm.load("tiny", **SETTINGS, speculation=SpeculationLimits(drafter="flash", drafters=("copy",)))
    media = {"images": [PICTURE]}

    def alone(on: mm.Model, prompt: str, **options: Any) -> list[list[int]]:
        return [list(ids) for ids in on.generate(prompt, **options).token_ids]

    def batch(on: mm.Model, size: int, prompt: str, request: Mapping[str, Any], **options: Any) -> list[list[int]]:
        requests = ({"prompt": f"{prompt} {i}", **request} for i in range(size))
        return [list(answer.token_ids[0]) for answer in on.generate_batch(requests, **options)]

    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "ignore_eos": True}
    return {
        "decode, batch 1": lambda: alone(model, "Hello", max_new_tokens=100, **GREEDY),
        "decode, batch 8": lambda: batch(model, 8, "Hello", {}, max_new_tokens=60, **GREEDY),
        "sampled, batch 8": lambda: batch(model, 8, "Hello", {}, max_new_tokens=40, **sampled),
        "pictures, batch 8": lambda: batch(model, 8, "What is it?", media, max_new_tokens=20, **GREEDY),
        "divprune": lambda: alone(
            model, "What?", **media, reducer="divprune", keep_ratio=0.25, max_new_tokens=20, **GREEDY
        ),
        "fastv": lambda: alone(
            model, "What?", **media, reducer="fastv:keep_ratio=0.25,layer=2", max_new_tokens=20, **GREEDY
        ),
        "flash": lambda: alone(drafting, "Describe the picture.", **media, max_new_tokens=60, **GREEDY),
        "copy, batch 4": lambda: batch(
            drafting, 4, "a b c d e f " * 5, {}, max_new_tokens=60, speculation="copy", **GREEDY
        ),
        "serving, 8 at once": build_serving(),
    }


def build_serving() -> Callable[[], list[str]]:
    """Chat completions with a picture through the application, all at once."""
    import httpx

    from serve.api.routes import create_app
    from serve.config import ServeConfig
    from serve.stages import build_local_runtime

    try:
        from mm.config import ModelConfig
    except ModuleNotFoundError:
        from mm.core.config import ModelConfig  # type: ignore[import-not-found]

    config = ServeConfig(model=ModelConfig(**SETTINGS))
    url = "data:image/png;base64," + base64.b64encode(Path(PICTURE).read_bytes()).decode()
    runner = asyncio.Runner()

    async def start() -> httpx.AsyncClient:
        app = create_app(build_local_runtime(config), config)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=60)

    client = runner.run(start())

    async def ask(number: int) -> str:
        content = [{"type": "text", "text": f"What is it? {number}"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 20, **GREEDY}
        answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(number) for number in range(8)))

    return lambda: runner.run(ask_all())


def work() -> None:
    """Run the case that each line of the input names, and say what it took and answered."""
    sys.path.insert(0, ".")
    import torch

    torch.set_num_threads(1)
    cases = build_cases()
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        answer = cases[line.strip()]()
        print(json.dumps({"cpu_s": time.process_time() - start, "answer": answer}), flush=True)


# ── both sides ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Side:
    """A checkout's process."""

    def __init__(self, folder: Path) -> None:
        command = [folder / ".venv/bin/python", Path(__file__).resolve(), "--work"]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.cases: list[str] = self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise SystemExit(f"{self.process.args} ended early, with status {self.process.wait()}")

    def run(self, case: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.communicate()


def compare(this: Side, base: Side, case: str, rounds: int) -> tuple[float, bool]:
    """The median ratio of some rounds, and whether both sides answered alike."""
    equal = this.run(case)["answer"] == base.run(case)["answer"]  # the first run of each is not timed
    ratios: list[float] = []
    for number in range(rounds):
        order = (this, base) if number % 2 else (base, this)
        spent = {side: side.run(case)["cpu_s"] for side in order}
        ratios.append(spent[this] / spent[base])
    return statistics.median(ratios), equal


def describe(case: str, pairs: list[tuple[float, bool]]) -> dict[str, Any]:
    ratios = [ratio for ratio, _ in pairs]
    low, high = median_interval(ratios)
    row = {"case": case, "ratio": statistics.median(ratios), "low": low, "high": high}
    rounded = {name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}
    return rounded | {"pairs": [round(ratio, 3) for ratio in ratios], "answers_equal": all(equal for _, equal in pairs)}


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a median, from ranks: each value lies on either side with probability one half."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n // 2 and (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    rank = max(0, rank - 1)
    return ordered[rank], ordered[n - 1 - rank]


def measure(base: Path, pairs: int, rounds: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    found: dict[str, list[tuple[float, bool]]] = {}
    for number in range(pairs):
        folders = [Path.cwd(), base]
        sides = [Side(folder) for folder in (folders if number % 2 else folders[::-1])]
        this, other = sides if number % 2 else sides[::-1]
        try:
            for case in wanted or this.cases:
                found.setdefault(case, []).append(compare(this, other, case, rounds))
        finally:
            for side in sides:
                side.close()
    for case, ratios in found.items():
        yield describe(case, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--pairs", type=int, default=10, help="6 or more; fewer give no 95 %% interval")
    parser.add_argument("--rounds", type=int, default=4, help="turns that each pair of processes takes at a case")
    parser.add_argument("--case", action="append", default=[], help="only this one; repeat for several")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    if args.base is None:
        parser.error("--base is missing: the checkout to compare with")
    if args.pairs < 6:
        parser.error(f"--pairs was {args.pairs}; it has to be 6 or more for a 95 % interval")
    if args.rounds < 1:
        parser.error(f"--rounds was {args.rounds}; it has to be 1 or more")
    for row in measure(args.base.resolve(), args.pairs, args.rounds, args.case):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
