"""How fast is a decoding step against transformers' `generate`, by batch size?

Run python -m demos.bench.decode [--model tiny | --shape 256m] [--batch 1 --batch 8] [--rounds 5] [--out FILE]

Both answer the same `batch` questions about one picture, greedily, `--new-tokens` each, in turn in one process and one
thread. A step is everything between two tokens of all sequences. For ours that is scheduling, the forward, sampling,
text and events. For `generate` (static batch, dynamic cache, SDPA) it is what it does between two calls of its stopping
criterion. Prompts have the same length, so it pads nothing. The median step is given in processor time of the thread,
because on a shared machine wall time would include the load of others. `floor` is the least time of a step at this
run's own rates of reading memory and of multiplying.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from demos.bench.machine import facts, product_gflop_per_s, read_gb_per_s
from demos.bench.path import picture
from demos.bench.shapes import SHAPES, write_shape
from mm.api import build_request
from mm.encode.pipeline import encode
from mm.models.checkpoint import find

QUESTION = "What is in the picture, and where is it?"


def our_steps(
    model: mm.Model, image: bytes, batch: int, num_tokens: int, clock: Callable[[], float] = time.process_time
) -> tuple[list[float], list[list[int]], float]:
    """Seconds of each pure decoding step, the tokens, and the share of the steps outside the model."""
    engine = model.engine
    requests = [
        build_request(QUESTION, images=[image], max_new_tokens=num_tokens, temperature=0, ignore_eos=True)
        for _ in range(batch)
    ]
    submitted = [model.loop.submit(request, encode(request, model.encode_parts)) for request in requests]
    steps, model_s, step_s = [], 0.0, 0.0
    while engine.has_work:
        before, start = engine.stats, clock()
        engine.step()
        elapsed, after = clock() - start, engine.stats
        if after.num_scheduled_tokens - before.num_scheduled_tokens == batch:
            steps.append(elapsed)
            model_s += after.model_s - before.model_s
            step_s += after.step_s - before.step_s
    outside = 1 - model_s / step_s
    tokens = [[i for event in one.queue.take() for i in getattr(event, "token_ids", ())] for one in submitted]
    return steps, tokens, outside


class Stamps:
    """A stopping criterion that never stops and records when it was called."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.times: list[float] = []
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.times.append(self._clock())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def their_steps(
    model, inputs: dict, num_tokens: int, clock: Callable[[], float] = time.process_time
) -> tuple[list[float], list[list[int]]]:
    stamps = Stamps(clock)
    out = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, stopping_criteria=[stamps])
    steps = [b - a for a, b in zip(stamps.times, stamps.times[1:], strict=False)]
    return steps, out[:, inputs["input_ids"].shape[1] :].tolist()


def floor_ms(model: mm.Model, batch: int, rows: int, rates: dict[str, float]) -> float:
    """Least time of a step: weights and cache read once, or the products, whichever is more."""
    language, dtype = model.engine.family.language, model.engine.cache.shape.dtype
    weights = language.num_layer_weights + language.head_weight.numel()
    shape = model.engine.cache.shape
    read = weights * dtype.itemsize + batch * rows * shape.token_bytes * shape.num_layers
    return max(1e-6 * read / rates["read_gb_per_s"], 2e-6 * weights * batch / rates["product_gflop_per_s"])


def bench(folder: str | Path, dtype: str, batches: list[int], rounds: int, num_tokens: int) -> list[dict]:
    path = find(folder)
    ours = mm.load(folder, dtype=dtype, max_num_seqs=max(batches), num_threads=1)
    theirs = AutoModelForImageTextToText.from_pretrained(
        path, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    theirs.eval().generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    image = picture(ours.encode_parts.encoder.config.vision_config.image_size)
    pixels = PIL.Image.open(io.BytesIO(image)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    rates = {
        "read_gb_per_s": read_gb_per_s(),
        "product_gflop_per_s": product_gflop_per_s(512, 1024, 1024, getattr(torch, dtype)),
    }
    found = []
    for batch in batches:
        inputs = processor(
            images=[pixels] * batch, text=[prompt] * batch, return_tensors="pt", add_special_tokens=False
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(theirs.dtype)
        mine, others, outside, same = [], [], [], []
        for turn in range(rounds + 1):
            steps, tokens, share = our_steps(ours, image, batch, num_tokens)
            theirs_steps, their_tokens = their_steps(theirs, inputs, num_tokens)
            if turn:
                mine.append(1e3 * statistics.median(steps))
                others.append(1e3 * statistics.median(theirs_steps))
                outside.append(share)
                same.append(tokens == their_tokens)
        rows = int(inputs["input_ids"].shape[1]) + num_tokens // 2
        found.append(
            {
                "dtype": dtype,
                "batch": batch,
                "prompt": int(inputs["input_ids"].shape[1]),
                "ours_ms": statistics.median(mine),
                "generate_ms": statistics.median(others),
                "ratio": statistics.median(b / a for a, b in zip(mine, others, strict=True)),
                "ratio_min": min(b / a for a, b in zip(mine, others, strict=True)),
                "floor_ms": floor_ms(ours, batch, rows, rates),
                "outside_model": statistics.median(outside),
                "same_tokens": all(same),
            }
        )
        print(line(found[-1]), flush=True)
    del ours, theirs
    gc.collect()
    return found


HEADER = (
    f"{'dtype':<10}{'batch':>6}{'prompt':>8}{'generate':>10}{'ours':>9}{'ratio':>8}{'worst':>8}{'floor':>8}"
    f"{'of floor':>10}{'outside':>9}  same tokens"
)


def line(row: dict) -> str:
    reached = row["floor_ms"] / row["ours_ms"]
    return (
        f"{row['dtype']:<10}{row['batch']:>6}{row['prompt']:>8}{row['generate_ms']:>10.2f}{row['ours_ms']:>9.2f}"
        f"{row['ratio']:>7.2f}x{row['ratio_min']:>7.2f}x{row['floor_ms']:>8.2f}{reached:>10.0%}"
        f"{row['outside_model']:>9.1%}  {row['same_tokens']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real model's shape")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.shape or args.model}: milliseconds of processor time per step, one thread\n{HEADER}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shape(Path(temporary), args.shape) if args.shape else args.model
        for dtype in args.dtype or ["bfloat16", "float32"]:
            rows += bench(folder, dtype, args.batch or [1, 8, 32], args.rounds, args.new_tokens)
    result = facts() | {"model": args.shape or args.model, "new_tokens": args.new_tokens, "rows": rows}
    print(json.dumps(result))
    if args.out:
        lines = [f"{args.shape or args.model}: milliseconds of processor time per step, one thread", HEADER]
        args.out.write_text("\n".join([*lines, *map(line, rows), "", json.dumps(result), ""]))


if __name__ == "__main__":
    main()
