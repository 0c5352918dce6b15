"""How much sooner are the pictures of one request encoded, if four encoders share them?

    python -m demos.bench.sharing [--encoders 4] [--pictures 8] [--requests 4] [--out FILE]

Two servers on Ray run in turn, with one encoder and with several. Each request brings new pictures and asks for one
token. A reducer that only sleeps makes each picture cost a fixed time, since the machine may have fewer cores than
encoders; all else costs what it costs. The figure is the median time of a request with several encoders over that with
one. The limit is the share of the pictures that one encoder gets at least. The first
tokens have to be the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from demos.bench.machine import facts
from demos.bench.ray_overhead import picture, server

GOAL = 0.35
TOLERANCE = 1e-3
"""A tower that gets fewer pictures at a time rounds otherwise; pictures in another order differ by far more."""
MODULE = '''
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from mm.plugins.reducer import Count, Reduction, Stage


@dataclass(frozen=True, kw_only=True)
class Slowed:
    """Keep all tokens, after a while."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    needs: ClassVar[frozenset[str]] = frozenset()
    query_aware: ClassVar[bool] = False
    count: ClassVar[Count] = "fixed"
    ms_per_token: float = 4.0

    def plan(self, num_tokens: int, *_: object) -> int:
        return num_tokens

    def after_encode(self, tokens, context) -> Reduction:
        time.sleep(self.ms_per_token * tokens.num_tokens / 1000)
        return Reduction(keep=torch.arange(tokens.num_tokens))
'''


def install(folder: Path) -> None:
    """Put the sleeping reducer where the servers' Python finds it, as an installed distribution."""
    info = folder / "slowed-1.0.dist-info"
    info.mkdir()
    (folder / "slowed.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slowed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mm.reducers]\nslowed = slowed:Slowed\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def ask(client: httpx.Client, seeds: range) -> tuple[float, dict]:
    """Seconds that a request takes, and its answer."""
    content: list[dict] = [{"type": "image_url", "image_url": {"url": picture(seed)}} for seed in seeds]
    content.append({"type": "text", "text": "What is there?"})
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 1}
    body |= {"logprobs": True, "top_logprobs": 5, "vision": {"reducer": "slowed"}}
    start = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - start
    answer.raise_for_status()
    return seconds, answer.json()["choices"][0]


def most_apart(answers: list[dict], expected: list[dict]) -> float:
    """The largest difference of a log-probability of an answer's first token; infinite where the tokens differ."""
    apart = 0.0
    for one, other in zip(answers, expected, strict=True):
        found, wanted = (
            {top["token"]: top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"]}
            for choice in (one, other)
        )
        same = found.keys() == wanted.keys()
        apart = max(apart, *(abs(found[token] - wanted[token]) for token in wanted)) if same else math.inf
    return apart


def measured(num_encoders: int, args: argparse.Namespace) -> tuple[list[float], list[dict], float]:
    """Seconds and answers of the requests, and how many of them were shared out."""
    options = ["--encoders", str(num_encoders), "--ray-cpus", "8", "--kv-cache-gb", "0.2", "--dtype", "float32"]
    with server(*options) as client:
        ask(client, range(1))  # the first report of an encoder
        found = [ask(client, range(1000 * (i + 1), 1000 * (i + 1) + args.pictures)) for i in range(args.requests)]
        metrics = client.get("/metrics").text.splitlines()
        shared = sum(float(line.split()[-1]) for line in metrics if line.startswith("mm:routing_shared_total{"))
    return [seconds for seconds, _ in found], [answer for _, answer in found], shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        alone, expected, _ = measured(1, args)
        seconds, answers, num_shared = measured(args.encoders, args)
    if (difference := most_apart(answers, expected)) > TOLERANCE:
        raise SystemExit(f"log-probabilities of the first tokens differ by {difference}")
    ratio = statistics.median(seconds) / statistics.median(alone)
    limit = -(-args.pictures // args.encoders) / args.pictures
    lines = [
        json.dumps(facts()),
        f"{args.pictures} pictures: {statistics.median(alone):.2f} s with 1 encoder, "
        f"{statistics.median(seconds):.2f} s with {args.encoders}: {ratio:.3f} (goal at most {GOAL}, limit "
        f"{limit:.3f}); {num_shared:.0f} of {args.requests} requests were shared out; log-probabilities "
        f"of the first tokens differ by at most {difference:.1e}",
    ]
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
