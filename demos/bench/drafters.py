"""What does drafting gain, by drafter, task, temperature and batch size?

Run python -m demos.bench.drafters [--drafter copy --drafter recycle ...] [--batch 1 --batch 4] [--seconds 20] [--out F]

All engines answer a batch of questions one after the other, in a new random order, then the next batch, in one process
and one thread. A round is four questions or more. A row gives the median over rounds of the ratio to the engine without
a drafter, so a machine that slows down slows all engines, and a 95 % interval of that median. Seconds are processor
time of the process, with wall time beside them, because on a shared machine wall time includes the load of others. The
row `none` is a second engine without a drafter: its distance from 1 is the noise. What falls below 0.97 is measured
again, alone beside the engine without a drafter and for as long. The row then holds the second measurement, and `first`
the one before. `hf` is transformers' `generate` with prompt lookup (batch 1, greedy) against its own `generate`.

Before a row's rounds every engine serves the same task for `--warm-up` seconds, so that the controller can measure what
pays. Pictures and prompts are in the caches then, so the timed part is decoding.

    length      tokens per step with a draft, the bonus token included
    per step    tokens per step and sequence, with or without a draft
    draft       share of the time in the drafter
    v(n)        a step with the mean number of drafted tokens over a step without, as the engine has measured it
    break-even  speed-up that arithmetic predicts: per step / (v of the mean number of tokens + draft share of a step)

In the chats of the task "asked again" the model has described a picture at some length, and is asked the same once
more. `repeats` is the share of the answers' tokens that end four tokens of the earlier answer: the model leaves things
out and continues in the same words.
"""

from __future__ import annotations

import argparse
import base64
import copy
import functools
import io
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch

import mm
from demos.bench.machine import facts
from mm.api import build_request, collect
from mm.config import SpeculationLimits
from mm.data.request import Request
from mm.engine.engine import LLMEngine
from mm.engine.loop import EngineLoop
from mm.engine.spec_decode.metrics import SpecDecodeStats
from serve.evaluation.items import held_out_path

TASKS: dict[str, dict[str, Any]] = {
    "captioning": {"questions": ("Describe the picture.", "Describe the picture in detail."), "length": 64},
    "question answering": {"questions": ("What colour is the circle?", "How many objects are there?"), "length": 16},
    "reading": {"questions": ("What does the text say?", "Read the text in the picture."), "length": 16},
    "asked again": {"questions": ("Describe the picture.", "Describe the picture in detail."), "length": 64},
}
AGAIN, PLAIN = "asked again", "plain"
NUM_CHATS, LONG = 16, 24
"""Pictures of a task; tokens of an answer that is asked for again."""
KV_BYTES = 1 << 28
"""Of each engine."""
AT_LEAST = 4
"""Questions of a round."""
LOW = 0.97
"""Speed-up below which a row is measured again."""
COUNTS = [f.name for f in fields(SpecDecodeStats) if f.name != "num_accepted_per_position"]


@dataclass
class Spent:
    """Seconds of one round, and what drafting did in it."""

    cpu_s: float
    wall_s: float
    num_tokens: int
    stats: SpecDecodeStats


def answer_all(
    models: dict[str, mm.Model], requests: list[Request], batch: int, turns: random.Random
) -> dict[str, Spent]:
    """Let each engine answer some requests: batch by batch, all engines in turn, in a new random order."""
    found: dict[str, list[Spent]] = {name: [] for name in models}
    for start in range(0, len(requests), batch):
        for name in turns.sample(list(models), len(models)):
            found[name].append(answer(models[name], requests[start : start + batch]))
    return {name: _sum(parts) for name, parts in found.items()}


def answer(model: mm.Model, requests: list[Request]) -> Spent:
    """Let an engine answer requests that come at once."""
    before = model.engine.stats.spec_decode
    cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
    for _, outcome in model.run_batch(requests):
        assert isinstance(outcome, list), outcome
        tokens += collect(iter(outcome)).usage.num_completion_tokens
    spent = time.process_time() - cpu, time.perf_counter() - wall
    return Spent(*spent, tokens, _since(before, model.engine.stats.spec_decode))


def _sum(parts: list[Spent]) -> Spent:
    counts = {name: sum(getattr(part.stats, name) for part in parts) for name in COUNTS}
    spent = sum(part.cpu_s for part in parts), sum(part.wall_s for part in parts)
    return Spent(*spent, sum(part.num_tokens for part in parts), _stats(counts))


def _since(before: SpecDecodeStats, after: SpecDecodeStats) -> SpecDecodeStats:
    return _stats({name: getattr(after, name) - getattr(before, name) for name in COUNTS})


def _stats(counts: dict[str, Any]) -> SpecDecodeStats:
    return SpecDecodeStats(**counts)


@functools.cache
def conversations(task: str, plain: mm.Model) -> list[list[dict[str, Any]]]:
    """Chats that end in a question, one for each picture."""
    found: list[list[dict[str, Any]]] = []
    for image in held_out_images(64 if task == AGAIN else NUM_CHATS):
        question = TASKS[task]["questions"][len(found) % 2]
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        first = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}
        chat: list[dict[str, Any]] = [{"role": "user", "content": list(first)}]
        if task == AGAIN:
            (outcome,) = (outcome for _, outcome in plain.run_batch([request_of(chat, task, 0.0, 0)]))
            assert isinstance(outcome, list), outcome
            answer = collect(iter(outcome))
            if len(answer.token_ids[0]) < LONG:
                continue
            chat.append({"role": "assistant", "content": answer.texts[0]})
            chat.append({"role": "user", "content": question})
        found.append(chat)
    return found[:NUM_CHATS]


def request_of(chat: list[dict[str, Any]], task: str, temperature: float, seed: int) -> Request:
    return build_request(chat, max_new_tokens=TASKS[task]["length"], temperature=temperature, seed=seed)


def requests_of(task: str, chats: list, temperature: float, count: int, number: int) -> list[Request]:
    """Those of one round."""
    return [
        request_of(chats[i % len(chats)], task, temperature, i) for i in range(number * count, (number + 1) * count)
    ]


def load(name: str) -> mm.Model:
    """The model without a drafter."""
    return mm.load(name, dtype="float32", num_threads=1)


def drafting(plain: mm.Model, speculation: SpeculationLimits) -> mm.Model:
    """The same weights under an engine that drafts: copies elsewhere in memory differ in speed by up to 3 %."""
    model, engine = copy.copy(plain), plain.engine
    model.engine = LLMEngine(engine.family, config=engine.config, kv_bytes=KV_BYTES, speculation=speculation)
    model.loop = EngineLoop(model.engine)
    return model


@functools.cache
def held_out_images(count: int) -> list[bytes]:
    """The first pictures of the held-out set."""
    table = pq.read_table(held_out_path(), columns=["media", "media_type"]).to_pylist()
    found = dict.fromkeys(row["media"] for row in table if row["media_type"].startswith("image/"))
    return list(found)[:count]


def repeats(task: str, plain: mm.Model) -> float:
    """Share of the tokens of greedy answers that end four tokens of the answer before."""
    tokenizer, hits, count = plain.engine.family.text_tokenizer, 0, 0
    for i, chat in enumerate(conversations(task, plain)):
        (outcome,) = (outcome for _, outcome in plain.run_batch([request_of(chat, task, 0.0, i)]))
        assert isinstance(outcome, list), outcome
        said = list(collect(iter(outcome)).token_ids[0])
        earlier = tokenizer.encode(chat[1]["content"], add_special_tokens=False).ids
        runs = set(zip(*(earlier[k:] for k in range(4)), strict=False))
        hits += sum(tuple(said[k - 3 : k + 1]) in runs for k in range(3, len(said)))
        count += len(said)
    return hits / count


def row_of(spec: str, rounds: list[tuple[Spent, Spent]], model: mm.Model, batch: int) -> dict[str, Any]:
    """Figures of a drafter on one task; each round beside the one without drafts."""
    ratios = [(a.cpu_s / a.num_tokens) / (b.cpu_s / b.num_tokens) for a, b in rounds]
    walls = [(a.wall_s / a.num_tokens) / (b.wall_s / b.num_tokens) for a, b in rounds]
    stats = _stats({name: sum(getattr(b.stats, name) for _, b in rounds) for name in COUNTS})
    cpu_s = sum(b.cpu_s for _, b in rounds)
    drafted = stats.num_draft_tokens / max(1, stats.num_target_steps)
    step_s = model.engine.spec_decoder.costs.step_s(batch, batch * np.array([0.0, drafted]))
    draft_of_step = stats.draft_s / max(1, stats.num_target_steps) * batch / step_s[0]
    return {
        "drafter": spec,
        "speedup_cpu": round(statistics.median(ratios), 3),
        "speedup_wall": round(statistics.median(walls), 3),
        "speedup_interval": interval_of_median(ratios),
        "accepted_length": round(stats.mean_acceptance_length, 2),
        "tokens_per_step": round(stats.tokens_per_target_step, 2),
        "acceptance_rate": round(stats.acceptance_rate, 2),
        "draft_share": round(stats.draft_s / cpu_s, 3),
        "verify_share": round(stats.verify_s / max(1e-9, sum(b.wall_s for _, b in rounds)), 3),
        "rows_per_step": round(1 + drafted, 2),
        "pass_cost": round(float(step_s[1] / step_s[0]), 2),
        "break_even": round(float(stats.tokens_per_target_step / (step_s[1] / step_s[0] + draft_of_step)), 2),
        "rounds": len(rounds),
    }


def interval_of_median(values: list[float]) -> list[float]:
    """The two values whose ranks bound the median with a probability of 95 %."""
    ordered, away = sorted(values), 0.98 * len(values) ** 0.5
    low, high = int(len(values) / 2 - away), math.ceil(len(values) / 2 + away) - 1
    return [round(ordered[max(low, 0)], 3), round(ordered[min(high, len(values) - 1)], 3)]


def compare(models: dict[str, mm.Model], task: str, batch: int, temperature: float, args: Any) -> list[dict]:
    """A row for each engine but the first, which has no drafter."""
    chats, count = conversations(task, models[PLAIN]), _per_round(batch)
    turns, number, start = random.Random(0), 0, time.process_time()
    while number < len(chats) // count or time.process_time() - start < args.warm_up * len(models):
        answer_all(models, requests_of(task, chats, temperature, count, number), batch, turns)
        number += 1
    found = []
    for row in _measured(models, task, batch, temperature, args, turns):
        if row["speedup_cpu"] < LOW:
            pair = {spec: models[spec] for spec in (PLAIN, row["drafter"])}
            (again,) = _measured(pair, task, batch, temperature, args, turns)
            row = again | {"first": row["speedup_cpu"]}
        found.append(row)
    return found


def _measured(
    models: dict[str, mm.Model], task: str, batch: int, temperature: float, args: Any, turns: random.Random
) -> list[dict]:
    chats, count = conversations(task, models[PLAIN]), _per_round(batch)
    rounds: list[dict[str, Spent]] = []
    start = time.process_time()
    while len(rounds) < args.rounds or time.process_time() - start < args.seconds:
        rounds.append(answer_all(models, requests_of(task, chats, temperature, count, len(rounds)), batch, turns))
    specs = [spec for spec in models if spec != PLAIN]
    for spec in specs:
        if models[spec].engine.stats.spec_decode.num_faults:
            raise RuntimeError(f"drafter {spec} failed on {task}, batch {batch}: the log above says how")
    return [row_of(spec, [(one[PLAIN], one[spec]) for one in rounds], models[spec], batch) for spec in specs]


def _per_round(batch: int) -> int:
    """Questions of a round: whole batches."""
    return -(-max(batch, AT_LEAST) // batch) * batch


def hugging_face(task: str, plain: mm.Model, args: Any) -> dict[str, Any]:
    """`generate` with prompt lookup against `generate`, greedy, batch 1."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mm.models.checkpoint import find

    folder = find(args.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ratios, start = [], time.process_time()
    while len(ratios) < args.rounds or time.process_time() - start < args.seconds / 2:
        chats = conversations(task, plain)
        chat = chats[len(ratios) % len(chats)]
        text = processor.apply_chat_template(_with_placeholder(chat), add_generation_prompt=True)
        image = PIL.Image.open(io.BytesIO(_picture(chat)))
        inputs = processor(images=[image], text=text, return_tensors="pt", add_special_tokens=False)
        spent = []
        for extra in ({}, {"prompt_lookup_num_tokens": 10}):
            began = time.process_time()
            model.generate(**inputs, max_new_tokens=TASKS[task]["length"], do_sample=False, **extra)
            spent.append(time.process_time() - began)
        ratios.append(spent[0] / spent[1])
    return {
        "drafter": "hf prompt lookup / hf",
        "speedup_cpu": round(statistics.median(ratios[1:]), 3),
        "rounds": len(ratios) - 1,
    }


def _picture(chat: list[dict[str, Any]]) -> bytes:
    return base64.b64decode(chat[0]["content"][0]["image_url"]["url"].partition(",")[2])


def _with_placeholder(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As transformers' templates want it: pictures are named in place, texts are parts."""
    question = chat[0]["content"][1]
    first = {"role": "user", "content": [{"type": "image"}, question]}
    later = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat[1:]]
    return [first, *later]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--drafter", action="append", help="Specification; repeat. Default: those without training.")
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--temperature", action="append", type=float)
    parser.add_argument("--seconds", type=float, default=16.0, help="Measured seconds of each task, all engines.")
    parser.add_argument("--rounds", type=int, default=8, help="At least so many.")
    parser.add_argument("--warm-up", type=float, default=1.0, help="Seconds of each engine before each task.")
    parser.add_argument("--no-control", action="store_true", help="Verify everything that is drafted.")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {PLAIN: load(args.model)}
    for spec in ("none", *(args.drafter or ("copy", "recycle", "copy + recycle"))):
        models[spec] = drafting(models[PLAIN], SpeculationLimits(drafter=spec, control=not args.no_control))
    found = []
    for name in args.task or TASKS:
        if name == AGAIN:
            print(f"task={name} repeats={repeats(name, models[PLAIN]):.2f}")
        for batch in args.batch or (1, 4, 16):
            for temperature in args.temperature or (0.0, 1.0):
                rows = compare(models, name, batch, temperature, args)
                if batch == 1 and not temperature and not args.no_hf:
                    rows.append(hugging_face(name, models[PLAIN], args))
                for row in rows:
                    found.append({"task": name, "batch": batch, "temperature": temperature} | row)
                    print(" ".join(f"{key}={value}" for key, value in found[-1].items()), flush=True)
    line = json.dumps(
        {"question": "drafters", "seconds": args.seconds, "warm_up": args.warm_up, "rows": found, "machine": facts()}
    )
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
