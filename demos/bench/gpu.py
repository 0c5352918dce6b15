"""How near to its limits does the engine run on a GPU, and how far from `generate`?

Run python -m demos.bench.gpu [--shape llava-1.5-7b --shape qwen2.5-7b] [--device cuda] [--out FILE]
Try it without a GPU: python -m demos.bench.gpu --device cpu --shape 256m --batch 1 --batch 4 --prompt-rows 256

Random weights of a real model's shape, bfloat16. The device's own rates are measured first: reading memory, and one
large product. Then

    prefill    one forward of `--prompt-rows` tokens, against the product rate
    decode     the median step of a batch, against reading weights and cache once, or the products, whichever is more;
               beside it `generate` (static batch, dynamic cache, SDPA), which answers the same questions

Each figure is appended to `--out` as a line of JSON as soon as it is known, so a run that is cut off keeps
what it has.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from demos.bench.decode import QUESTION, floor_ms, our_steps, their_steps
from demos.bench.machine import best_s, facts, product_gflop_per_s, read_gb_per_s, wall_s
from demos.bench.path import picture
from demos.bench.shapes import SHAPES, write_shape
from mm.engine.attention.base import build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk
from mm.engine.model_runner import ModelRunner


class Report:
    """Prints each figure and stores it at once."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, **row: Any) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


def prefill(model: mm.Model, num_rows: int, rates: dict[str, float], device: str) -> dict:
    """One forward of one sequence, without the scheduler and without any cached prefix."""
    language = model.engine.family.language
    shape = language.kv_cache_spec
    cache = KVCache(shape, num_blocks=shape.num_layers * shape.num_blocks(num_rows), max_num_seqs=1)
    decoder = ModelRunner(language, build_attention(cache))
    ids = torch.randint(0, 256, (num_rows,), generator=torch.Generator().manual_seed(0))
    embeddings = language.embed(ids)
    positions = torch.arange(num_rows, device=embeddings.device)[None]

    def run() -> None:
        slot = cache.allocate()
        decoder.forward([Chunk(seq_index=slot, embeddings=embeddings, positions=positions, num_logits=1)])
        cache.free(slot)

    seconds = best_s(run, device=device)
    weights = language.num_layer_weights
    products = 2 * weights * num_rows
    scores = 4 * shape.num_layers * num_rows**2 // 2 * language.config.num_attention_heads * shape.head_dim
    reached = 1e-9 * (products + scores) / seconds / rates["product_gflop_per_s"]
    return {"what": "prefill", "rows": num_rows, "ms": 1e3 * seconds, "of_product_rate": reached}


def decode(model: mm.Model, image: bytes, batch: int, num_tokens: int, rates: dict[str, float], device: str) -> dict:
    our_steps(model, image, batch, 8, partial(wall_s, device))
    steps, tokens, outside = our_steps(model, image, batch, num_tokens, partial(wall_s, device))
    ms = 1e3 * statistics.median(steps)
    side = model.encode_parts.encoder.config.vision_config.image_size // 14
    floor = floor_ms(model, batch, side**2 + num_tokens // 2, rates)
    row = {"what": "decode", "server": "ours", "batch": batch, "step_ms": ms, "tokens_per_s": 1e3 * batch / ms}
    return row | {"limit_ms": floor, "of_limit": floor / ms, "outside_model": outside, "tokens": tokens[0][:8]}


def generate(path: Path, image: bytes, batches: list[int], num_tokens: int, device: str, report: Report) -> None:
    theirs: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    )
    theirs = theirs.eval().to(device)
    theirs.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    pixels = PIL.Image.open(io.BytesIO(image)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for batch in batches:
        inputs = processor(
            images=[pixels] * batch, text=[prompt] * batch, return_tensors="pt", add_special_tokens=False
        ).to(device, dtype=torch.bfloat16)
        their_steps(theirs, inputs, 4, partial(wall_s, device))
        steps, _ = their_steps(theirs, inputs, num_tokens, partial(wall_s, device))
        ms = 1e3 * statistics.median(steps)
        report.add(what="decode", server="generate", batch=batch, step_ms=ms, tokens_per_s=1e3 * batch / ms)


def bench(name: str, args: argparse.Namespace, report: Report) -> None:
    device = args.device
    rates = {
        "read_gb_per_s": read_gb_per_s(device=device),
        "product_gflop_per_s": product_gflop_per_s(*args.product, torch.bfloat16, device),
    }
    report.add(what="limits", shape=name, **rates)
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(Path(folder), name, device=device)
        gc.collect()
        image = picture(SHAPES[name].image_size)
        for graphs in (True, False) if device.startswith("cuda") else (False,):
            model = mm.load(
                path, device=device, dtype="bfloat16", max_num_seqs=max(args.batch), cuda_graphs=graphs, num_threads=1
            )
            attention = type(build_attention(KVCache(model.engine.cache.shape, num_blocks=1, max_num_seqs=1))).__name__
            report.add(what="ours", shape=name, graphs=graphs, attention=attention)
            report.add(**prefill(model, args.prompt_rows, rates, device))
            for batch in args.batch:
                report.add(**decode(model, image, batch, args.new_tokens, rates, device), graphs=graphs)
            del model
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
        generate(path, image, args.batch, args.new_tokens, device, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, action="append", help="batch sizes; 1, 8 and 64 when not given")
    parser.add_argument("--prompt-rows", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--product", type=int, nargs=3, help="rows, inner and columns of the product that is timed")
    parser.add_argument("--out", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    args.batch = sorted(args.batch or [1, 8, 64])
    args.product = args.product or ([8192] * 3 if on_gpu else [512, 1024, 1024])
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device is here; try --device cpu --shape 256m --batch 1 --batch 4 --prompt-rows 256")
    report = Report(args.out)
    report.add(what="machine", **facts())
    for name in args.shape or ["llava-1.5-7b", "qwen2.5-7b"]:
        bench(name, args, report)


if __name__ == "__main__":
    main()
