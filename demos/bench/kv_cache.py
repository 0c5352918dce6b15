"""What dropping tokens inside the decoder frees, how many more sequences fit, and what prefix caching saves.

Run python -m demos.bench.kv_cache [--model tiny | --shape 256m] [--rounds 5] [--out FILE]

Bytes: the cache after one prompt with a picture, as the engine counts its blocks, beside what arithmetic gives for the
tokens that each layer keeps. Then how many sequences decode at once in a cache of `--requests` unreduced prompts,
beside what follows from the bytes: each has its prompt and one more block per layer to grow into.
Reuse: time to the first token of a first and a second question about a picture, everything included, in processor
time: with both caches, without the prefix cache, and without any cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import mm
from demos.bench.machine import facts
from demos.bench.path import picture
from demos.bench.shapes import SHAPES, write_shape
from mm.api import build_request
from mm.data.request import Request
from mm.encode.pipeline import encode
from mm.engine.loop import OutputQueue
from mm.models.checkpoint import find

QUESTIONS = ("What is in the picture, and where is it?", "How many squares are there, and which one is red?")
KEEP = 0.25


def submit(model: mm.Model, request: Request, reducer: str) -> OutputQueue:
    return model.loop.submit(request, replace(encode(request, model.encode_parts), reducer=reducer)).queue


def ask(image: bytes, question: str = QUESTIONS[0], num_tokens: int = 1) -> Request:
    return build_request(question, images=[image], max_new_tokens=num_tokens, temperature=0, ignore_eos=True)


def run_until_first_token(model: mm.Model, feed: OutputQueue) -> None:
    while model.engine.step():
        if any(getattr(event, "token_ids", ()) for event in feed.take()):
            return


def expected_bytes(model: mm.Model, num_rows: int, num_visual: int, layer: int | None) -> int:
    """Blocks of every layer: all tokens below `layer`, and from it on those that are left."""
    shape = model.engine.cache.shape
    left = num_rows - num_visual + round(KEEP * num_visual)
    rows = [num_rows if layer is None or i < layer else left for i in range(shape.num_layers)]
    return sum(shape.num_blocks(count) for count in rows) * shape.block_bytes


def capacity(model: mm.Model, image: bytes, reducer: str, count: int) -> int:
    """Most sequences that decode at once before one of them has to be preempted."""
    for _ in range(count):
        submit(model, ask(image, num_tokens=400), reducer)
    most = 0
    for _ in range(2 * count):
        model.engine.step()
        stats = model.engine.stats
        if stats.num_preemptions:
            break
        most = max(most, stats.num_running)
    return most


def bytes_table(path: Path, count: int) -> list[dict]:
    probe = mm.load(path, dtype="bfloat16", num_threads=1)
    image = picture(probe.encode_parts.encoder.config.vision_config.image_size)
    num_layers = probe.engine.cache.shape.num_layers
    layers = sorted({1, 2, num_layers // 4, num_layers // 2} - {0})
    prompt = probe.engine.family.splice(
        ask(image).messages, [item.tokens for item in encode(ask(image), probe.encode_parts).items]
    )
    num_rows, num_visual = prompt.length, int(prompt.is_visual.sum())
    full = expected_bytes(probe, num_rows + 1, num_visual, None)
    kv_gb = count * full / 2**30
    del probe
    found = []
    for layer in (None, *layers):
        reducer = "none" if layer is None else f"fastv:keep_ratio={KEEP},layer={layer}"
        # Equal prompts would share their blocks.
        options: dict = {
            "kv_cache_gb": kv_gb,
            "max_num_seqs": 16 * count,
            "max_batch_tokens": 2048,
            "prefix_caching": False,
        }
        model = mm.load(path, dtype="bfloat16", num_threads=1, max_waiting=4096, **options)
        feed = submit(model, ask(image, num_tokens=2), reducer)
        run_until_first_token(model, feed)
        held = model.engine.stats.kv_used_bytes
        expected = expected_bytes(model, num_rows, num_visual, layer)
        while model.engine.step():
            pass
        found.append(
            {
                "layer": layer,
                "bytes": held,
                "expected_bytes": expected,
                "expected_answer_bytes": expected + num_layers * model.engine.cache.shape.block_bytes,
                "answers_at_once": capacity(model, image, reducer, 4 * count),
            }
        )
        print(bytes_line(found[-1], found[0]), flush=True)
        del model
    return found


def bytes_line(row: dict, full: dict) -> str:
    name = "nothing" if row["layer"] is None else f"{1 - KEEP:.0%} before layer {row['layer']}"
    as_arithmetic_says = full["expected_answer_bytes"] / row["expected_answer_bytes"]
    more = row["answers_at_once"] / full["answers_at_once"]
    return (
        f"{name:<22}{row['bytes'] / 2**20:>10.2f}{row['expected_bytes'] / 2**20:>12.2f}"
        f"{1 - row['bytes'] / full['bytes']:>8.0%}{row['answers_at_once']:>9}{more:>8.2f}x{as_arithmetic_says:>10.2f}x"
    )


def first_token_ms(model: mm.Model, image: bytes, question: str) -> float:
    start = time.process_time()
    feed = submit(model, ask(image, question), "none")
    run_until_first_token(model, feed)
    elapsed = time.process_time() - start
    while model.engine.step():
        pass
    return 1e3 * elapsed


def reuse_table(path: Path, rounds: int) -> list[dict]:
    caches = {
        "both": {},
        "features only": {"prefix_caching": False},
        "none": {"prefix_caching": False, "cache_bytes": 0},
    }
    found = []
    for name, options in caches.items():
        model = mm.load(path, num_threads=1, **options)
        side_px = model.encode_parts.encoder.config.vision_config.image_size
        times: list[Sequence[float]] = []
        for turn in range(rounds + 1):
            image = picture(side_px) + bytes(turn)  # another file each round, so that nothing of it is cached
            times.append([first_token_ms(model, image, question) for question in QUESTIONS])
        first, second = (statistics.median(column) for column in zip(*times[1:], strict=True))
        found.append({"caches": name, "first_ms": first, "second_ms": second})
        print(reuse_line(found[-1]), flush=True)
    return found


def reuse_line(row: dict) -> str:
    first, second = row["first_ms"], row["second_ms"]
    return f"{row['caches']:<22}{first:>10.1f}{second:>10.1f}{second / first:>8.2f}"


BYTES_HEADER = f"{'dropped':<22}{'MiB':>10}{'arithmetic':>12}{'freed':>8}{'answers':>9}{'':>9}{'by bytes':>11}"
REUSE_HEADER = f"{'caches':<22}{'first ms':>10}{'second ms':>10}{'ratio':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real model's shape")
    parser.add_argument("--requests", type=int, default=32, help="unreduced prompts that fit in the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = args.shape or args.model
    with tempfile.TemporaryDirectory() as temporary:
        path = write_shape(Path(temporary), args.shape) if args.shape else find(args.model)
        print(f"{name}: cache of one prompt with a picture, bfloat16\n{BYTES_HEADER}", flush=True)
        held = bytes_table(path, args.requests)
        print(f"\n{name}: time to the first token\n{REUSE_HEADER}", flush=True)
        reuse = reuse_table(path, args.rounds)
    data = json.dumps(facts() | {"model": name, "bytes": held, "reuse": reuse})
    print(data)
    if args.out:
        report = [f"{name}: cache of one prompt with a picture, bfloat16", BYTES_HEADER]
        report += [bytes_line(row, held[0]) for row in held]
        report += ["", f"{name}: time to the first token", REUSE_HEADER, *map(reuse_line, reuse), "", data, ""]
        args.out.write_text("\n".join(report))


if __name__ == "__main__":
    main()
