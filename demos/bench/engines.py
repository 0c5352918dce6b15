"""The native engine and vLLM's, one after the other in one run: what they answer, and how long they take.

Run python -m demos.bench.engines [--model tiny | --shape 256m] [--rounds 5] [--requests 16] [--out FILE]

It needs vLLM beside mm; see docs/engines.md. Each engine gets the same requests in float32 on one thread: one picture
and a question, greedy. A line has, per engine and reducer, medians over the rounds:

    first      milliseconds from the question to the first token, the picture encoded before
    token      milliseconds per further token of one request
    batch      tokens per second of `--requests` requests together, their pictures encoded before
    equal      answers of the batch whose tokens are the native engine's

Engines take turns within a round, so that the load of others falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers

import mm
from demos.bench.machine import facts
from demos.bench.shapes import SHAPES, write_shape
from mm.api import build_request

REDUCERS = ("none", "divprune:keep_ratio=0.25")
QUESTION = "What color is the large shape on the left?"


@dataclass
class Times:
    """Seconds, and what was answered."""

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)


def pictures(number: int, side: int) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(one).resize((side, side)) for one in small]


def one_request(
    model: mm.Model, picture: PIL.Image.Image, reducer: str, num_tokens: int, salt: str, into: Times
) -> None:
    """Time a request that finds no prefix of another one."""
    request = build_request(
        QUESTION, images=[picture], reducer=reducer, max_new_tokens=num_tokens, ignore_eos=True, temperature=0.0,
        cache_salt=salt, positions="compact",
    )  # fmt: skip
    media = model._encode(request)
    start = time.perf_counter()
    stamps = [time.perf_counter() for event in model.loop.stream_sync(request, media) if hasattr(event, "token_ids")]
    into.first.append(stamps[0] - start)
    into.token.append((stamps[-1] - stamps[0]) / (num_tokens - 1))


def many_requests(
    model: mm.Model, images: list[PIL.Image.Image], reducer: str, num_tokens: int, salt: str, into: Times
) -> None:
    """Time requests that are all there at the start."""
    requests = [
        build_request(
            QUESTION, images=[one], reducer=reducer, max_new_tokens=num_tokens, ignore_eos=True, temperature=0.0,
            cache_salt=salt, positions="compact",
        )
        for one in images
    ]  # fmt: skip
    media = [model._encode(request) for request in requests]
    start = time.perf_counter()
    submitted = [model.loop.submit(*pair) for pair in zip(requests, media, strict=True)]
    answers = [tuple(t for event in model.loop.read(one) for t in getattr(event, "token_ids", ())) for one in submitted]
    into.batch.append(len(images) * num_tokens / (time.perf_counter() - start))
    into.answers = answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = args.model
        if args.shape:
            write_shape(Path(folder), args.shape)
            name = folder
        lines = run(name, args.shape or args.model, args)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def run(name: str, label: str, args: argparse.Namespace) -> list[str]:
    """The table's lines."""
    common = {"dtype": "float32", "num_threads": 1, "max_num_seqs": args.requests, "kv_cache_gb": 1.0}
    models = {engine: mm.load(name, engine=engine, **common) for engine in ("native", "vllm")}
    times = {(engine, reducer): Times() for engine in models for reducer in REDUCERS}
    images = pictures(args.requests, 224)
    for round_index in range(args.rounds + 1):
        for (engine, reducer), into in times.items():
            into = into if round_index else Times()  # the first round warms up
            salt = f"{round_index}-{engine}-{reducer}"
            one_request(models[engine], images[0], reducer, args.tokens, f"{salt}-one", into)
            many_requests(models[engine], images, reducer, args.tokens, salt, into)
    import vllm

    about = facts()
    where = f"{about['cpu']}, commit {about['commit'][:10]}, load {about['load_average']}, Python {about['python']}"
    versions = f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"{label}, float32, 1 thread, {args.rounds} rounds, {args.requests} requests; {where}; {versions}", ""]
    lines.append(f"{'engine':8}{'reducer':28}{'first ms':>10}{'token ms':>10}{'batch tok/s':>13}{'equal':>8}")
    for (engine, reducer), found in times.items():
        expected = times["native", reducer].answers
        equal = sum(one == other for one, other in zip(found.answers, expected, strict=True))
        lines.append(
            f"{engine:8}{reducer:28}{1e3 * statistics.median(found.first):10.1f}"
            f"{1e3 * statistics.median(found.token):10.2f}{statistics.median(found.batch):13.0f}"
            f"{f'{equal}/{len(expected)}':>8}"
        )
    for model in models.values():
        model.close()
    return lines


if __name__ == "__main__":
    main()
