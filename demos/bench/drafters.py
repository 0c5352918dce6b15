"""What does drafting gain, by drafter, task, temperature and batch size?

Run python -m demos.bench.drafters [--drafter copy --drafter recycle ...] [--batch 1 --batch 4] [--rounds 3] [--out F]

Every engine answers the same questions, in turn in one process and one thread, round after round; what is told is the
median over rounds of each round's ratio to the engine without a drafter, so a machine that slows down slows all of
them. Seconds are processor time of the thread, with wall time beside them: on a shared machine wall time tells the
others' load. `hf` is transformers' `generate` with prompt lookup (batch 1, greedy) against its own `generate`.

    length      tokens per pass with a draft, the bonus token included
    per step    tokens per pass and answer, with or without a draft
    draft       share of the time in the drafter
    v(n)        a pass of n + 1 rows over a pass of one, as the engine has measured it
    break-even  speed-up that arithmetic predicts: per step / (v of the mean number of rows + draft share of a pass)

Repeat-heavy: the model is told to go on past the end of its answer, and falls into repeating itself. Nobody wants that
text, but copying from it is as hard as copying from a table or a program. Trained drafters join by name: --drafter.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch

import mm
from demos.bench.machine import facts
from mm.api import build_request, collect
from mm.core.config import SpeculationLimits
from serve.evaluation.items import held_out_path

TASKS: dict[str, dict[str, Any]] = {
    "captioning": {"questions": ("Describe the picture.", "Describe the picture in detail."), "length": 64},
    "question answering": {"questions": ("What colour is the circle?", "How many objects are there?"), "length": 16},
    "reading": {"questions": ("What does the text say?", "Read the text in the picture."), "length": 16},
    "repeat-heavy": {"questions": ("Describe the picture.", "What does the text say?"), "length": 160, "goes_on": True},
}


@dataclass
class Spent:
    """Seconds of one round, and what drafting did in it."""

    cpu_s: float
    wall_s: float
    num_tokens: int
    stats: Any


def answer_all(model: mm.Model, task: dict[str, Any], batch: int, temperature: float, count: int) -> Spent:
    requests = [
        build_request(
            task["questions"][i % len(task["questions"])],
            images=[image_of(i)],
            max_new_tokens=task["length"],
            temperature=temperature,
            seed=i,
            ignore_eos=task.get("goes_on", False),
        )
        for i in range(count)
    ]
    model.engine.speculation.stats.__init__(num_accepted_per_position=[0] * 255)
    cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
    for start in range(0, count, batch):
        for _, outcome in model.run_batch(requests[start : start + batch]):
            assert isinstance(outcome, list), outcome
            tokens += collect(iter(outcome)).usage.num_completion_tokens
    stats = model.engine.stats.speculation
    return Spent(time.process_time() - cpu, time.perf_counter() - wall, tokens, stats)


@functools.cache
def held_out_images(count: int = 16) -> list[bytes]:
    """The first pictures of the held-out set."""
    table = pq.read_table(held_out_path(), columns=["media", "media_type"]).to_pylist()
    found = dict.fromkeys(row["media"] for row in table if row["media_type"].startswith("image/"))
    return list(found)[:count]


def image_of(i: int) -> bytes:
    images = held_out_images()
    return images[i % len(images)]


def row_of(spec: str, rounds: list[tuple[Spent, Spent]], model: mm.Model) -> dict[str, Any]:
    """Figures of a drafter on one task; each round beside the one without drafts."""
    ratios = [(a.cpu_s / a.num_tokens) / (b.cpu_s / b.num_tokens) for a, b in rounds]
    walls = [(a.wall_s / a.num_tokens) / (b.wall_s / b.num_tokens) for a, b in rounds]
    stats = rounds[-1][1].stats
    rows = 1 + stats.num_draft_tokens / max(1, stats.num_target_steps)
    times = model.engine.speculation.times
    passes = times.seconds(np.array([1.0, rows]))
    share = stats.draft_s / max(1e-9, rounds[-1][1].cpu_s)
    draft_of_pass = stats.draft_s / max(1, stats.num_target_steps) / passes[0]
    return {
        "drafter": spec,
        "speedup_cpu": round(statistics.median(ratios), 3),
        "speedup_wall": round(statistics.median(walls), 3),
        "accepted_length": round(stats.mean_acceptance_length, 2),
        "tokens_per_step": round(stats.tokens_per_target_step, 2),
        "acceptance_rate": round(stats.acceptance_rate, 2),
        "draft_share": round(share, 3),
        "verify_share": round(stats.verify_s / max(1e-9, rounds[-1][1].wall_s), 3),
        "rows_per_step": round(rows, 2),
        "pass_cost": round(float(passes[1] / passes[0]), 2),
        "break_even": round(float(stats.tokens_per_target_step / (passes[1] / passes[0] + draft_of_pass)), 2),
    }


def compare(models: dict[str, mm.Model], task: dict[str, Any], batch: int, temperature: float, args: Any) -> list[dict]:
    rounds: dict[str, list[tuple[Spent, Spent]]] = {spec: [] for spec in models if spec != "none"}
    count = max(batch, args.questions)
    for number in range(args.rounds + 1):
        plain = answer_all(models["none"], task, batch, temperature, count)
        for spec, model in models.items():
            if spec != "none":
                spent = answer_all(model, task, batch, temperature, count)
                if number:  # the first round warms up: code, caches, what control has measured
                    rounds[spec].append((plain, spent))
    return [row_of(spec, found, models[spec]) for spec, found in rounds.items()]


def hugging_face(task: dict[str, Any], args: Any) -> dict[str, Any]:
    """`generate` with prompt lookup against `generate`, greedy, batch 1."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mm.models.checkpoint import find

    folder = find(args.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    ratios = []
    for number in range(args.rounds + 1):
        spent = []
        for extra in ({}, {"prompt_lookup_num_tokens": 10}):
            start = time.process_time()
            for i in range(args.questions):
                text = task["questions"][i % len(task["questions"])]
                content = [{"type": "image"}, {"type": "text", "text": text}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                inputs = processor(
                    images=[PIL.Image.open(io.BytesIO(image_of(i)))],
                    text=prompt,
                    return_tensors="pt",
                    add_special_tokens=False,
                )
                more = {"eos_token_id": None} if task.get("goes_on") else {}
                model.generate(**inputs, max_new_tokens=task["length"], do_sample=False, **more, **extra)
            spent.append(time.process_time() - start)
        if number:
            ratios.append(spent[0] / spent[1])
    return {"drafter": "hf prompt lookup / hf", "speedup_cpu": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--drafter", action="append", help="Specification; repeat. Default: those without training.")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--temperature", action="append", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--no-control", action="store_true", help="Verify everything that is drafted.")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    specs = ["none", *(args.drafter or ("copy", "recycle", "copy + recycle"))]
    models = {
        spec: mm.load(
            args.model,
            dtype="float32",
            num_threads=1,
            speculation=SpeculationLimits(drafter=spec, control=not args.no_control),
        )
        for spec in specs
    }
    found = []
    for name in args.task or TASKS:
        for batch in args.batch or (1, 4, 16):
            for temperature in args.temperature or (0.0, 1.0):
                rows = compare(models, TASKS[name], batch, temperature, args)
                if batch == 1 and not temperature and not args.no_hf:
                    rows.append(hugging_face(TASKS[name], args))
                for row in rows:
                    found.append({"task": name, "batch": batch, "temperature": temperature} | row)
                    print(" ".join(f"{key}={value}" for key, value in found[-1].items()), flush=True)
    line = json.dumps({"question": "drafters", "rounds": args.rounds, "rows": found, "machine": facts()})
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
