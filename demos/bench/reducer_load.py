"""Does reduction still raise throughput with many concurrent requests?

Run python -m demos.bench.reducer_load [--model tiny | --shape 256m] [--kind image | video] [--in-flight 32]
    [--requests 96] [--out FILE]

Every registered method that acts on the kind and works with the model takes part, at a quarter of the tokens.
Pictures, or clips of four frames, are encoded and reduced first. Then the engine answers `--requests` questions,
`--in-flight` of them at a time, each for `--new-tokens` greedy tokens. The report gives the decoder's throughput, in
generated tokens per second of processor time (one thread), prefill included, and the same with encoding and selection
counted too. Methods take turns, round after round, and the ratio is to `none` of the same round. Every question shows a
picture or clip of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

import mm
from demos.bench.budgets import methods_for, spec_of
from demos.bench.machine import facts
from demos.bench.path import picture
from demos.bench.shapes import SHAPES, write_shape
from mm.api import build_request
from mm.config import MediaLimits
from mm.data.media import Kind
from mm.data.request import VisionOptions
from mm.encode.pipeline import encode
from mm.encode.policy import resolve_reducer
from mm.engine.loop import Submitted
from mm.errors import MmError
from mm.media import MediaBudget, video_from_array
from mm.models.checkpoint import find
from serve.evaluation.report import markdown

SPECS = {
    "pool2": "pool2",
    "mustdrop": "mustdrop",
    "pixelprune": "pixelprune:tau=0.02",
    "fastv": "fastv:layer=1,keep_ratio=0.25",
}
"""What is asked of methods without a ratio, and of those with other options."""

NUM_FRAMES = 4
QUESTION = "What is in the picture, and where is it?"


def methods_of(model: mm.Model, kind: Kind) -> list[str]:
    """`none`, and a quarter of the tokens by every method that works with the model."""
    found = []
    for method in methods_for(kind, model.engine.family.folder):
        spec = SPECS.get(method) or spec_of(method, 0.25)
        try:
            resolve_reducer(VisionOptions(reducer=spec), model.encode_parts)
        except MmError as error:
            print(f"{method} is left out: {error}")
            continue
        found.append(spec)
    return found


def medium(kind: Kind, side_px: int, number: int, round_number: int) -> dict[str, list]:
    """A picture or clip that no other request has."""
    if kind == "image":
        return {"images": [picture(side_px) + number.to_bytes(2, "big") + bytes([round_number])]}
    still = np.asarray(PIL.Image.open(io.BytesIO(picture(side_px))).convert("RGB"))
    frames = np.stack([np.roll(still, 9 * t, axis=1) for t in range(NUM_FRAMES)])
    frames[:, :2, :8] = number, round_number, 0
    times = [t / 2 for t in range(NUM_FRAMES)]
    return {"videos": [video_from_array(frames, times, NUM_FRAMES / 2, MediaBudget(MediaLimits()))]}


def throughput(model: mm.Model, reducer: str, args: argparse.Namespace, round_number: int) -> dict[str, float]:
    engine = model.engine
    side_px = model.encode_parts.encoder.config.vision_config.image_size
    engine.prefix_cache.clear()
    start = time.process_time()
    waiting = []
    for i in range(args.requests):
        request = build_request(
            QUESTION,
            **medium(args.kind, side_px, i, round_number),
            reducer=reducer,
            max_new_tokens=args.new_tokens,
            temperature=0,
            ignore_eos=True,
        )
        waiting.append((request, encode(request, model.encode_parts)))
    encoded = time.process_time()
    running: list[Submitted] = []
    while waiting or running:
        while waiting and len(running) < args.in_flight:
            running.append(model.loop.submit(*waiting.pop()))
        engine.step()
        running = [one for one in running if not _has_ended(one)]
    done = time.process_time()
    tokens = args.requests * args.new_tokens
    return {"decoder": tokens / (done - encoded), "all": tokens / (done - start)}


def _has_ended(submitted: Submitted) -> bool:
    if submitted.queue.has_ended:
        submitted.queue.raise_error()
    return submitted.queue.has_ended


def bench(path: Path, args: argparse.Namespace) -> list[dict]:
    model = mm.load(path, dtype=args.dtype, max_num_seqs=args.in_flight, max_waiting=4096, num_threads=1, cache_bytes=0)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in args.reducer or methods_of(model, args.kind)}
    for number in range(args.rounds):
        for method in found:
            found[method].append(throughput(model, method, args, number))
    rows = []
    for method, rounds in found.items():
        row: dict = {"method": method}
        for key in ("decoder", "all"):
            row[key] = statistics.median(r[key] for r in rounds)
            pairs = zip(rounds, found["none"], strict=True)
            row[f"{key}_ratio"] = statistics.median(mine[key] / none[key] for mine, none in pairs)
        rows.append(row)
    return rows


HEADER = f"{'method':<34}{'decoder tok/s':>14}{'':>9}{'with encoding':>15}"


def line(row: dict) -> str:
    return (
        f"{row['method']:<34}{row['decoder']:>14.0f}{row['decoder_ratio']:>8.2f}x{row['all']:>15.0f}"
        f"{row['all_ratio']:>8.2f}x"
    )


def report_load(record: dict) -> str:
    """The table for a page."""
    rows = [
        [
            f"`{row['method']}`",
            f"{row['decoder']:.0f}",
            f"{row['decoder_ratio']:.2f}x",
            f"{row['all']:.0f}",
            f"{row['all_ratio']:.2f}x",
        ]
        for row in record["rows"]
    ]
    return markdown(["method", "decoder, tokens/s", "of `none`", "with encoding", "of `none`"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real model's shape")
    parser.add_argument("--kind", choices=("image", "video"), default="image")
    parser.add_argument("--reducer", action="append", help="methods, `none` among them; all when not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = args.shape or args.model
    with tempfile.TemporaryDirectory() as temporary:
        path = write_shape(Path(temporary), args.shape) if args.shape else find(args.model)
        rows = bench(path, args)
    title = f"{name}, {args.kind}: {args.in_flight} concurrent requests, {args.new_tokens} tokens each, {args.dtype}, "
    title += "one thread"
    report = [
        title,
        HEADER,
        *map(line, rows),
        "",
        json.dumps(facts() | {"model": name, "kind": args.kind, "rows": rows}),
        "",
    ]
    print("\n".join(report))
    if args.out:
        args.out.write_text("\n".join(report))


if __name__ == "__main__":
    main()
