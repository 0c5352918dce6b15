"""Requests of mixed lengths that arrive at random: what is the throughput, and how long is the time to the first token?

Run python -m demos.bench.serving [--model tiny | --shape 256m] [--requests 64] [--rounds 3] [--out FILE]

Each request shows none, one or two pictures of its own, asks a question of random length and takes a random number of
greedy tokens. The same requests, at the same times, are served in turn by

    ours              mm's engine; one waiting request is encoded between two of its steps
    static            transformers' `generate` on all waiting requests, at most `--static-batch`, padded; finished
                      sequences stay until the whole batch is finished
    one at a time     transformers' `generate` on the request that has waited longest

in one process and one thread. The clock is the processor time of the process, and it jumps to the next arrival when
there is nothing to do, because on a shared machine wall time would include the load of others. Requests arrive within
`--window` of the time that `ours` takes alone for all of them at once, so that every server is kept busy.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from demos.bench.machine import facts
from demos.bench.shapes import SHAPES, write_shape
from demos.train.data.scenes import draw_scene, sample_scene
from mm.api import build_request
from mm.encode.pipeline import encode
from mm.models.checkpoint import find

WORDS = (
    "what",
    "colour",
    "is",
    "the",
    "large",
    "round",
    "shape",
    "left",
    "of",
    "word",
    "and",
    "how",
    "many",
    "squares",
)


@dataclass
class Ask:
    """One request, and when its tokens came."""

    pictures: list[bytes]
    text: str
    num_tokens: int
    arrival: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0


class Clock:
    """Processor time of this process, moved on by hand while there is nothing to do."""

    def __init__(self) -> None:
        self._zero = time.process_time()

    def now(self) -> float:
        return time.process_time() - self._zero

    def skip_to(self, moment: float) -> None:
        self._zero -= max(0.0, moment - self.now())


def sample_asks(count: int, side_px: int, median_tokens: int, seed: int = 0) -> list[Ask]:
    """Few long answers among many short ones, as servers see them."""
    rng, asks = np.random.default_rng(seed), []
    for i in range(count):
        pictures = []
        for j in range(int(rng.choice([0, 1, 1, 1, 2]))):
            picture = PIL.Image.fromarray(draw_scene(sample_scene(10_000 + 2 * i + j))).resize((side_px, side_px))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(4, 40))))
        num_tokens = int(np.clip(median_tokens * rng.lognormal(0, 0.8), 4, 5 * median_tokens))
        asks.append(Ask(pictures, text, num_tokens))
    return asks


def serve_ours(model: mm.Model, asks: list[Ask]) -> None:
    engine, clock, running = model.engine, Clock(), {}
    waiting = list(asks)
    while waiting or engine.has_work:
        if not engine.has_work:
            clock.skip_to(waiting[0].arrival)
        if waiting and waiting[0].arrival <= clock.now():
            ask = waiting.pop(0)
            request = build_request(
                ask.text, images=ask.pictures, max_new_tokens=ask.num_tokens, temperature=0, ignore_eos=True
            )
            running[model.loop.submit(request, encode(request, model.encode_parts)).queue] = ask
        engine.step()
        for feed, ask in list(running.items()):
            if feed.has_ended:
                del running[feed]
            for event in feed.take():
                if ids := getattr(event, "token_ids", ()):
                    ask.last = clock.now()
                    ask.first = ask.first or ask.last
                    ask.token_ids += ids


class Lengths:
    """Ends each sequence after its wanted number of tokens, and records when they came."""

    def __init__(self, asks: list[Ask], clock: Clock) -> None:
        self._asks, self._clock, self._count = asks, clock, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self._count += 1
        now = self._clock.now()
        for ask in self._asks:
            ask.first = ask.first or now
            if self._count <= ask.num_tokens:
                ask.last = now
        return torch.tensor([self._count >= ask.num_tokens for ask in self._asks])


class Theirs:
    """transformers' `generate` with a waiting queue in front of it."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"

    def serve(self, asks: list[Ask], batch: int) -> None:
        clock, waiting = Clock(), list(asks)
        while waiting:
            clock.skip_to(waiting[0].arrival)
            now = clock.now()
            taken = [ask for ask in waiting if ask.arrival <= now][:batch]
            waiting = waiting[len(taken) :]
            self._generate(taken, clock)

    def _generate(self, asks: list[Ask], clock: Clock) -> None:
        images = [PIL.Image.open(io.BytesIO(data)).convert("RGB") for ask in asks for data in ask.pictures]
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [*({"type": "image"} for _ in ask.pictures), {"type": "text", "text": ask.text}],
                    }
                ],
                add_generation_prompt=True,
            )
            for ask in asks
        ]
        inputs = self.processor(
            images=images or None, text=texts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(dtype=self.model.dtype)
        out = self.model.generate(
            **inputs,
            max_new_tokens=max(ask.num_tokens for ask in asks),
            do_sample=False,
            stopping_criteria=[Lengths(asks, clock)],
        )
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
        for ask, ids in zip(asks, answers, strict=True):
            ask.token_ids = ids[: ask.num_tokens]


def figures(asks: list[Ask]) -> dict[str, float]:
    waits = sorted(ask.first - ask.arrival for ask in asks)
    total = sum(len(ask.token_ids) for ask in asks)
    return {
        "tokens_per_s": total / max(ask.last for ask in asks),
        "ttft_p50_s": statistics.median(waits),
        "ttft_p99_s": float(np.percentile(waits, 99)),
    }


def bench(path: Path, dtype: str, median_tokens: int, args: argparse.Namespace) -> dict:
    ours = mm.load(path, dtype=dtype, max_num_seqs=64, num_threads=1, cache_bytes=0)
    theirs = Theirs(path, dtype)
    side_px = ours.encode_parts.encoder.config.vision_config.image_size
    base = sample_asks(args.requests, side_px, median_tokens)
    base_tokens = sum(ask.num_tokens for ask in base)
    servers: dict[str, Callable[[list[Ask]], None]] = {
        "ours": lambda asks: serve_ours(ours, asks),
        "static": lambda asks: theirs.serve(asks, args.static_batch),
        "one at a time": lambda asks: theirs.serve(asks, 1),
    }
    warm = [Ask(ask.pictures, ask.text, ask.num_tokens) for ask in base]
    serve_ours(ours, warm)
    alone_s = max(ask.last for ask in warm)
    arrivals = np.sort(np.random.default_rng(1).uniform(0, args.window * alone_s, len(base)))
    rounds: list[dict[str, dict]] = []
    tokens: dict[str, list] = {}
    for _ in range(args.rounds):
        ours.engine.prefix_cache.clear()
        found = {}
        for name, serve in servers.items():
            asks = [Ask(a.pictures, a.text, a.num_tokens, float(t)) for a, t in zip(base, arrivals, strict=True)]
            serve(asks)
            assert sum(len(ask.token_ids) for ask in asks) == base_tokens
            found[name], tokens[name] = figures(asks), [ask.token_ids for ask in asks]
        rounds.append(found)
    rows = {name: {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]} for name in servers}
    for name, row in rows.items():
        speed = [r["ours"]["tokens_per_s"] / r[name]["tokens_per_s"] for r in rounds]
        row["ours_is_faster"] = statistics.median(speed)
        row["same_tokens"] = statistics.mean(a == b for a, b in zip(tokens["ours"], tokens[name], strict=True))
    return {
        "dtype": dtype,
        "median_tokens": median_tokens,
        "requests": len(base),
        "tokens": base_tokens,
        "servers": rows,
    }


HEADER = (
    f"{'dtype':<10}{'median':>7}  {'server':<16}{'tokens/s':>10}{'TTFT p50':>10}{'p99':>8}{'ours is':>9}"
    "  requests with our tokens"
)


def lines(result: dict) -> list[str]:
    return [
        f"{result['dtype']:<10}{result['median_tokens']:>7}  {name:<16}{row['tokens_per_s']:>10.0f}"
        f"{row['ttft_p50_s']:>10.2f}{row['ttft_p99_s']:>8.2f}"
        f"{row['ours_is_faster']:>8.2f}x  {row['same_tokens']:.0%}"
        for name, row in result["servers"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a real model's shape")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--median-tokens", type=int, action="append", help="of the answers' lengths")
    parser.add_argument("--static-batch", type=int, default=32)
    parser.add_argument("--window", type=float, default=0.5)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = args.shape or args.model
    report = [f"{name}: {args.requests} requests, seconds of processor time, one thread", HEADER]
    print("\n".join(report), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        path = write_shape(Path(temporary), args.shape) if args.shape else find(args.model)
        for dtype in args.dtype or ["bfloat16", "float32"]:
            for median_tokens in args.median_tokens or [30, 100]:
                results.append(bench(path, dtype, median_tokens, args))
                print("\n".join(lines(results[-1])), flush=True)
                report += lines(results[-1])
    data = json.dumps(facts() | vars(args) | {"out": None, "results": results})
    print(data)
    if args.out:
        args.out.write_text("\n".join([*report, "", data, ""]))


if __name__ == "__main__":
    main()
