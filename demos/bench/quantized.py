"""What do decoder weights of 8 bits bring on a CPU, against float32 in the same run?

Run python -m demos.bench.quantized [--model tiny | --shape 256m] [--batch 1 --batch 8] [--rounds 5] [--out FILE]

Both models answer the same questions about one picture, in turn in one process and one thread: processor time of the
median decoding step, and of the first token of one question without a picture in the caches. `weights` are the bytes
that a decoder holds, the head and the embedding included. `floor` is the time to read these bytes at the rate measured
in this run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import mm
from demos.bench.decode import QUESTION, our_steps
from demos.bench.machine import facts, read_gb_per_s
from demos.bench.path import picture
from demos.bench.shapes import SHAPES, write_shape
from mm.build import build_engine
from mm.config import model_config

KINDS = ("none", "int8")


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            size = item.numel() * item.element_size()
            key = id(item) if item.is_mkldnn else item.untyped_storage().data_ptr()
            found[key] = max(size, found.get(key, 0))
    return sum(found.values())


def decoder_bytes(folder: str | Path, kind: str) -> int:
    """Bytes of the tensors of a decoder, its KV cache left out."""
    before = tensor_bytes()
    engine = build_engine(model_config(model=str(folder), dtype="float32", quantize=kind, kv_cache_gb=0.1))
    cache = sum(part.numel() * part.element_size() for part in (engine.cache.keys, engine.cache.values))
    return tensor_bytes() - before - cache


def first_token_s(model: mm.Model, image: bytes) -> float:
    start = time.process_time()
    model.generate(QUESTION, images=[image], max_new_tokens=1, temperature=0)
    return time.process_time() - start


def bench(folder: str | Path, batches: list[int], rounds: int, num_tokens: int) -> list[dict]:
    weights = {kind: decoder_bytes(folder, kind) for kind in KINDS}
    options = {"dtype": "float32", "max_num_seqs": max(batches), "num_threads": 1, "cache_bytes": 0}
    models = {kind: mm.load(folder, quantize=kind, prefix_caching=False, **options) for kind in KINDS}
    image = picture(models["none"].encode_parts.encoder.config.vision_config.image_size)
    rate = read_gb_per_s()
    found = []
    for batch in [0, *batches]:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(rounds + 1):
            for kind, model in models.items():
                spent = statistics.median(our_steps(model, image, batch, num_tokens)[0]) if batch else None
                spent = first_token_s(model, image) if spent is None else spent
                if turn:
                    times[kind].append(1e3 * spent)
        row = {"case": f"step, batch {batch}" if batch else "first token, encoder included"}
        row |= {f"{kind}_ms": round(statistics.median(times[kind]), 3) for kind in KINDS}
        ratios = [a / b for a, b in zip(times["int8"], times["none"], strict=True)]
        row |= {"ratio": round(statistics.median(ratios), 3), "worst": round(max(ratios), 3)}
        found.append(row | {f"{kind}_floor_ms": round(weights[kind] / rate * 1e-6, 3) for kind in KINDS if batch})
        print(json.dumps(found[-1]), flush=True)
    shares = {f"{kind}_mb": round(size / 1e6, 2) for kind, size in weights.items()}
    found.append({"case": "weights", **shares, "ratio": round(weights["int8"] / weights["none"], 3)})
    print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real model's shape")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_shape(Path(temporary), args.shape) if args.shape else args.model
        rows = bench(folder, args.batch or [1, 8, 32], args.rounds, args.new_tokens)
    if args.out:
        facts_of_run = facts() | {"model": args.shape or args.model, "new_tokens": args.new_tokens}
        args.out.write_text("\n".join(map(json.dumps, [facts_of_run, *rows])) + "\n")


if __name__ == "__main__":
    main()
