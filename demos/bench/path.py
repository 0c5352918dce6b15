"""Where does the time of one request go, and what does reduction save?

Run python -m demos.bench.path [--model tiny | --shape 256m] [--reducer divprune:keep_ratio=0.25] [--repeats 7] [--out
FILE]

One picture, one question, `--new-tokens` greedy tokens, one thread, float32. Interleaved in one process, every round:

    ours, none       mm's whole path, nothing reduced
    ours, REDUCER    the same with the reducer
    generate         the same work by transformers: processor, then `generate`; tokens are compared with `ours, none`

Stages: load (bytes to pixels, and for `generate` its processor), encode (tower and projector, preprocessing included
for ours), reduce, prefill (to the first token's logits), decode (the other tokens). Prefill and decode are different
regimes and stand apart, each beside the limit measured in the same run: prefill against the rate of a matrix product,
decode against reading the decoder's weights and the cache once per token. The feature cache is off. Shapes with
random weights are for speed only.
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
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from demos.bench.machine import facts, product_gflop_per_s, read_gb_per_s
from mm.models.checkpoint import find

STAGES = ("load", "encode", "reduce", "prefill", "decode")
QUESTION = "What is in the picture?"
SHAPES = {
    # Width, layers, heads, kv heads and tower of SmolVLM-256M's size, in LLaVA's architecture.
    "256m": {
        "width": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "image_size": 336,
        "strategy": "default",
    },
}


def picture(side_px: int) -> bytes:
    """PNG bytes of a smooth random picture."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((side_px, side_px), PIL.Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def run_ours(model: mm.Model, image: bytes, num_tokens: int, reducer: str) -> dict:
    start = time.perf_counter()
    answer = model.generate(
        QUESTION, images=[image], max_new_tokens=num_tokens, temperature=0, ignore_eos=True, reducer=reducer
    )
    total = time.perf_counter() - start
    stages = {stage: getattr(answer.timings, f"{stage}_s") for stage in STAGES}
    return stages | {"total": total, "tokens": list(answer.token_ids[0]), "prompt": answer.usage.num_prompt_tokens}


class Clock:
    """Seconds inside the tower and projector, and the moments at which `generate` asks for a token."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.encode_s = 0.0
        self.moments: list[float] = []
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave)

    def _enter(self, *_) -> None:
        self._since = time.perf_counter()

    def _leave(self, *_) -> None:
        self.encode_s += time.perf_counter() - self._since

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return scores


def run_generate(model: torch.nn.Module, processor: object, clock: Clock, image: bytes, num_tokens: int) -> dict:
    clock.encode_s, clock.moments = 0.0, []
    start = time.perf_counter()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = PIL.Image.open(io.BytesIO(image)).convert("RGB")
    inputs = processor(images=[pixels], text=prompt, return_tensors="pt", add_special_tokens=False)
    loaded = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, logits_processor=[clock])
    end = time.perf_counter()
    stages = {
        "load": loaded - start,
        "encode": clock.encode_s,
        "reduce": 0.0,
        "prefill": clock.moments[0] - loaded - clock.encode_s,
        "decode": end - clock.moments[0],
    }
    length = inputs.input_ids.shape[1]
    return stages | {"total": end - start, "tokens": out[0, length:].tolist(), "prompt": length}


def medians(runs: list[dict]) -> dict[str, float]:
    """Milliseconds per stage."""
    return {stage: 1e3 * statistics.median(run[stage] for run in runs) for stage in (*STAGES, "total")}


def limits(model: mm.Model, prompt_tokens: int) -> dict[str, float]:
    """Milliseconds that prefill and one decoded token take at least, at this run's own measured rates."""
    language = model.engine.family.language
    layers = language.num_layer_weights
    weights = layers + language.head_weight.numel()
    config = language.config
    rate = product_gflop_per_s(prompt_tokens, config.hidden_size, config.intermediate_size)
    bandwidth = read_gb_per_s()
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * prompt_tokens
    return {
        "product_gflop_per_s": round(rate, 1),
        "read_gb_per_s": round(bandwidth, 1),
        "prefill_ms": 2e-6 * layers * prompt_tokens / rate,
        "token_ms": 4e-6 * (weights + cache) / bandwidth,
    }


def bench(folder: str | Path, reducers: list[str], repeats: int, num_tokens: int) -> dict:
    model = mm.load(folder, dtype="float32", cache_bytes=0, prefix_caching=False)
    theirs = AutoModelForImageTextToText.from_pretrained(
        find(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    processor = AutoProcessor.from_pretrained(find(folder), local_files_only=True, trust_remote_code=False)
    theirs.generation_config.eos_token_id = None  # both run to the last token; min_length would forbid the end
    clock = Clock(theirs)
    image = picture(model.encode_parts.encoder.config.vision_config.image_size)
    ways = {
        f"ours, {name}": (lambda name=name: run_ours(model, image, num_tokens, name)) for name in ["none", *reducers]
    }
    ways["generate"] = lambda: run_generate(theirs, processor, clock, image, num_tokens)
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            result = way()
            if turn:
                runs[name].append(result)
    same = runs["ours, none"][0]["tokens"] == runs["generate"][0]["tokens"]
    rows = {name: medians(of) | {"prompt_tokens": of[0]["prompt"]} for name, of in runs.items()}
    return {
        "rows": rows,
        "same_tokens_as_generate": same,
        "limits": {name: limits(model, int(row["prompt_tokens"])) for name, row in rows.items() if name != "generate"},
    }


def report(result: dict, num_tokens: int) -> str:
    lines = [f"{'':<36}{'prompt':>7}" + "".join(f"{stage:>10}" for stage in (*STAGES, "total")) + "   (ms, median)"]
    for name, row in result["rows"].items():
        lines.append(
            f"{name:<36}{row['prompt_tokens']:>7}" + "".join(f"{row[stage]:>10.1f}" for stage in (*STAGES, "total"))
        )
    lines.append("")
    theirs, base = result["rows"]["generate"], result["rows"]["ours, none"]
    for name, row in result["rows"].items():
        if name == "generate":
            continue
        limit = result["limits"][name]
        prefill, token = limit["prefill_ms"] / row["prefill"], limit["token_ms"] * (num_tokens - 1) / row["decode"]
        lines.append(
            f"{name}: faster than generate by {theirs['prefill'] / row['prefill']:.2f}x in prefill, "
            f"{theirs['decode'] / row['decode']:.2f}x in decode, {theirs['total'] / row['total']:.2f}x in total; "
            f"than 'ours, none' by {base['total'] / row['total']:.2f}x in total; "
            f"{prefill:.0%} of the product limit in prefill, {token:.0%} of the bandwidth limit in decode"
        )
    lines.append(f"greedy tokens of 'ours, none' equal generate's: {result['same_tokens_as_generate']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="random weights of a real model's shape instead of --model"
    )
    parser.add_argument("--reducer", action="append", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reducers = args.reducer or ["divprune:keep_ratio=0.25"]
    with tempfile.TemporaryDirectory() as temporary:
        folder: str | Path = args.model
        if args.shape:
            from tests.helpers.checkpoints import random_llava

            folder = random_llava(Path(temporary), **SHAPES[args.shape])
        result = bench(folder, reducers, args.repeats, args.new_tokens)
    config = {
        "model": args.shape or args.model,
        "reducers": reducers,
        "repeats": args.repeats,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "dtype": "float32",
    }
    line = json.dumps({"question": "path", "config": config, "machine": facts(), **result})
    text = report(result, args.new_tokens) + "\n\n" + line
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
