"""What does each reduction method cost in right answers, and what does it save, on the model we ship?

Every registered reducer at keep_ratio 1, .5, .25, .1 and .05, `none` included, answers the same questions of the
held-out set in one process, through the same engine and attention that serve requests. Pictures and clips are two runs.
Each method and ratio is one JSON line, written as soon as it is known: run the command again to continue.
`demos.bench.reducer_figures` makes tables and plots of the file.

    python -m demos.bench.reducers --kind image --out demos/bench/results/reducers-tiny-image.jsonl [--limit 40]
        [--task color --task read] [--methods divprune fastv] [--minutes 20]

`demos.bench.reducer_page` runs both kinds and puts the tables into the page.

Accuracy: right answers per question, scored as `mm eval` does. `--limit` takes the first so many of each task and
wording, the same for all. A picture is encoded once, with all that any method needs from the tower, and then reduced by
each. At keep_ratio 1 a method has nothing to do: its answers to a few questions are compared with those of `none`,
and the others are not asked again.

Cost: a few questions one at a time, in turns with `none`, nothing cached. Seconds are CPU time of this process with one
thread, as others use the machine. `encode` is the time of decoded pixels with what the method needs from the tower.
`select` is the method's own decisions (those inside the decoder are part of `prefill` too). `prefill` is the time to
the first token, and `ttft` the sum of encoding, selecting outside the decoder and prefill. KV bytes are those of the
tokens in the cache at the first token.

A method's ratio is the share of tokens left after the last layer that drops some; `layers_kept` is the mean over
layers. `budgets.py` gives the form of each method's budget. For MustDrop and PixelPrune the thresholds that leave the
wanted share of a few items' tokens are searched.

Methods with trained weights come last, and their lines name these weights. Lines of other weights are measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mm
from demos.bench.budgets import RATIOS, THRESHOLDS, is_learned, methods_for, ratios_of, spec_of
from demos.bench.machine import facts
from demos.bench.reducer_bench import NUM_FRAMES, Bench
from mm.config import ModelConfig
from mm.errors import IncompatiblePlugin, InvalidOption
from mm.models.checkpoint import find, weights_hash
from mm.plugins.features import BLOCK_KEYS, TEXT_EMBEDDINGS
from mm.plugins.reducer import Stage
from mm.plugins.spec import build_reducer
from serve.evaluation.items import Item, choose, read_test_set
from serve.evaluation.scoring import is_right
from serve.lines import cut_unfinished_line

NUM_SAME = 1
"""Questions of each task and wording that are asked at keep_ratio 1."""

# ── the measurements ──────────────────────────────────────────────────────────────────────────────────────────────────


def probes(items: Sequence[Item], count: int) -> list[Item]:
    """A few items, each of another medium and, where possible, of another task."""
    chosen: dict[int, Item] = {}
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    for turn in range(max(map(len, by_task.values()))):
        for of_task in by_task.values():
            if turn < len(of_task) and len(chosen) < count:
                chosen.setdefault(of_task[turn].media_index, of_task[turn])
    return list(chosen.values())


def costs(bench: Bench, items: Sequence[Item], spec: str, repeats: int) -> dict[str, float]:
    """Medians; `..._over_none` are against `none` in the same turns."""
    runs: dict[str, list[dict[str, float]]] = {"none": [], spec: []}
    for turn in range(repeats + 1):
        for item in items if turn else items[:1]:  # the first one warms up
            for which, of in runs.items():
                cost = bench.cost(item, which)
                of += [cost] if turn else []
    mine, full = (
        {key: statistics.median(run[key] for run in of) for key in of[0]} for of in (runs[spec], runs["none"])
    )
    for which, of in ((spec, mine), ("none", full)):
        of["encode"] = bench.encode_s(items, bench.reducer(which), repeats)
        of["ttft"] = of["encode"] + of.pop("reduce_and_prefill")
    over = {f"{key}_over_none": round(mine[key] / full[key], 4) for key in ("prefill", "ttft", "kv_bytes")}
    return {key: round(value, 6) for key, value in mine.items()} | over


def threshold_for(bench: Bench, items: Sequence[Item], method: str, keep_ratio: float) -> float:
    """The threshold of a method that leaves `keep_ratio` of the items' tokens, by bisection of its logarithm."""
    low, high = THRESHOLDS[method]
    for _ in range(8):
        middle = (low * high) ** 0.5
        kept = [bench.kept(item, spec_of(method, keep_ratio, middle)) for item in items]
        low, high = (middle, high) if statistics.mean(kept) > keep_ratio else (low, middle)
    return (low * high) ** 0.5


def measure(bench: Bench, items: Sequence[Item], args: argparse.Namespace, method: str, keep_ratio: float) -> dict:
    """One line of the file."""
    probed = probes(items, args.probes)
    needs_threshold = method in THRESHOLDS and keep_ratio < 1
    many = probes(items, (4 if args.kind == "image" else 1) * args.probes)
    threshold = threshold_for(bench, many, method, keep_ratio) if needs_threshold else None
    spec = spec_of(method, keep_ratio, threshold)
    asked = list(items) if keep_ratio < 1 or method == "none" else first_of_each(items, NUM_SAME)
    answers = bench.answers(asked, spec)
    right = {i.id: is_right(answers[i.id][0], (i.answer, *i.accepted), i.scoring) for i in asked}
    cost = costs(bench, probed, spec, args.repeats)
    kept = round(sum(kept for _, _, kept in answers.values()) / sum(n for _, n, _ in answers.values()), 4)
    if bench.reducer(spec).acts_at == (Stage.IN_DECODE,):
        kept = cost["kept"]  # answers count what the prompt was computed with
    return {
        "method": method,
        "keep_ratio": keep_ratio,
        "spec": spec,
        "kept": kept,
        "asked": [item.id for item in asked],
        "right": [item.id for item in asked if right[item.id]],
        "texts": {item.id: answers[item.id][0] for item in first_of_each(asked, NUM_SAME)},
        "cost": cost,
        "weights": weights_of(bench, spec),
    }


def weights_of(bench: Bench, spec: str) -> str:
    """Names the weights of a reducer; empty for one without."""
    loaded = getattr(bench.reducer(spec), "loaded", None)
    return loaded.pinned if loaded is not None else ""


def plan_of(methods: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float]]:
    """Method and ratio of each measurement but that of `none`: learned methods last, keep_ratio 1 after the others."""
    learned = [m for m in methods if is_learned(m)]
    plan = []
    for group in ([m for m in methods if m != "none" and m not in learned], learned):
        plan += [(m, ratio) for ratio in ratios if ratio < 1 for m in group if ratio in ratios_of(m)]
        plan += [(m, 1.0) for m in group if 1.0 in ratios and 1.0 in ratios_of(m)]
    return plan


def first_of_each(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count` of each task and wording."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for item in items:
        key = item.task, item.wording
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= count:
            chosen.append(item)
    return chosen


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings_of(args: argparse.Namespace, items: Sequence[Item], sha256: str) -> dict[str, Any]:
    """What lines of one file have in common."""
    ids = hashlib.sha256("\n".join(item.id for item in items).encode()).hexdigest()[:16]
    return {
        "question": "reducers",
        "kind": args.kind,
        "model": args.model,
        "weights": weights_hash(find(args.model))[:16],
        "data": sha256[:16],
        "limit": args.limit,
        "num_items": len(items),
        "items": ids,
        "num_frames": NUM_FRAMES,
        "dtype": "float32",
        "threads": 1,
        "repeats": args.repeats,
        "probes": args.probes,
    }


def done_before(path: Path, settings: dict[str, Any], weights: dict[str, str]) -> set[tuple[str, float]]:
    """Which (method, keep_ratio) the file has; starts it with the settings where there is none.

    Lines of a method whose weights were others are removed.
    """
    if not path.exists():
        path.write_text(json.dumps({"settings": settings, "machine": facts()}) + "\n")
        return set()
    cut_unfinished_line(path)
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    if different := [key for key, value in settings.items() if head["settings"].get(key) != value]:
        key = different[0]
        raise SystemExit(
            f"{path} was measured with {key}={head['settings'].get(key)!r}, this run has {settings[key]!r}; "
            "give the same settings or another --out"
        )
    kept = [line for line in lines if line.get("weights", "") == weights.get(line["method"], line.get("weights", ""))]
    if len(kept) < len(lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in (head, *kept)))
    return {(line["method"], line["keep_ratio"]) for line in kept}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; a file of the same settings is continued")
    parser.add_argument("--kind", choices=("image", "video"), required=True)
    parser.add_argument("--limit", type=int, default=40, help="questions of each task and wording")
    parser.add_argument("--task", action="append", default=[], help="only this task; repeat for several")
    parser.add_argument("--methods", nargs="*", default=None, help="all that are registered when not given")
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--probes", type=int, default=3, help="questions whose costs are measured")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, help="start no method later than this; the next run continues from there"
    )
    return parser


def main() -> None:
    args = arguments().parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    test_set = read_test_set()
    items = [item for item in choose(test_set, args.task, limit=args.limit) if item.kind == args.kind]
    model = mm.Model(
        ModelConfig(
            model=args.model, dtype="float32", num_threads=1, cache_bytes=0, prefix_caching=False, kv_cache_gb=0.5
        )
    )
    everything = methods_for(args.kind, model.engine.family.folder)
    if unknown := sorted({*(args.methods or ())} - {*everything}):
        able = ", ".join(everything)
        raise SystemExit(f"{', '.join(unknown)} cannot reduce {args.kind}s of {args.model}; these can: {able}")
    wanted = everything if args.methods is None else ["none", *(m for m in args.methods if m != "none")]
    plan = [("none", 1.0), *plan_of(wanted, args.ratios)]
    needs = frozenset().union(*(build_reducer(spec_of(m, 0.25, 0.01)).needs for m in wanted))
    bench = Bench(model, needs - {TEXT_EMBEDDINGS, BLOCK_KEYS})
    weights = {m: weights_of(bench, spec_of(m, ratios_of(m)[0], 0.01)) for m in wanted}
    done = done_before(args.out, settings_of(args, items, test_set.sha256), weights)
    for method, keep_ratio in plan:
        if (method, keep_ratio) in done:
            continue
        if args.minutes is not None and time.monotonic() - begun > 60 * args.minutes:
            print(
                f"{args.minutes:g} minutes are over: run again to continue from {method} at {keep_ratio:g}", flush=True
            )
            break
        start, cpu = time.perf_counter(), time.process_time()
        try:
            line = measure(bench, items, args, method, keep_ratio)
        except (IncompatiblePlugin, InvalidOption) as error:
            print(f"{method:12} {keep_ratio:<5g} left out: {error}", flush=True)
            continue
        line["cpu_s"] = round(time.process_time() - cpu, 1)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        share = len(line["right"]) / len(line["asked"])
        print(
            f"{method:12} {keep_ratio:<5g} {share:6.1%} of {len(line['asked'])} right, "
            f"kept {line['kept']:.3f}, {line['cpu_s']:.0f} s CPU in {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
