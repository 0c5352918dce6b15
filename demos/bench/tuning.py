"""Is a schedule that `mm tune` finds better than one ratio for all layers, at equal FLOPs?

    python -m demos.bench.tuning [--restart] [--budget 0.4 0.6] [--trials 16] [--tune-limit 8] [--limit 30]

Searches the shipped model with the first `--tune-limit` questions on pictures of each task and wording: the sigmoid
under each budget, and the greedy search. The resulting files, which `mm serve --reducer FILE` takes, and the trials are
kept in demos/bench/results/tuned. A stopped run can be continued; `--restart` forgets it.

The next `--limit` questions of each task and wording then compare the results with what needs no search: FastV at one
layer and PyramidDrop, with their ratio set so that a prefill takes as many FLOPs. Answers are compared question by
question, with bootstrap intervals over pictures. This takes less than ten minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mm
from demos.bench.folds import Scorer
from demos.bench.machine import facts
from demos.bench.reducer_bench import Bench
from demos.bench.reducer_figures import points
from mm.config import ModelConfig
from serve.cli.options import read_reducer
from serve.evaluation.intervals import interval
from serve.evaluation.items import Item, choose, read_test_set
from serve.evaluation.report import markdown
from serve.evaluation.scoring import is_right
from serve.tuning.command import Tuning, run_tuning
from serve.tuning.schedule import STEP, Schedule, Shape
from serve.tuning.sigmoid import largest

RESULTS = Path("demos/bench/results")
FOUND = RESULTS / "tuned"


def rivals(num_layers: int) -> dict[str, tuple[Callable[[float], Schedule], str]]:
    """Name to the schedule of a last ratio, and the specification that has it."""
    stages = num_layers - 1
    found: dict[str, tuple[Callable[[float], Schedule], str]] = {
        f"fastv, layer {layer}": (
            lambda ratio, layer=layer: (*[1.0] * layer, *[ratio] * (num_layers - layer)),
            f"fastv:layer={layer},keep_ratio=%g",
        )
        for layer in (1, 2)
    }
    pyramid = f"pyramiddrop:num_stages={stages},at_layers=[{','.join(map(str, range(1, num_layers)))}],keep_ratio=%g"
    found["pyramiddrop"] = (lambda ratio: tuple(ratio ** (i / stages) for i in range(num_layers)), pyramid)
    return found


def ratio_for(shape: Shape, schedule: Callable[[float], Schedule], flop_share: float) -> float | None:
    """The largest ratio whose schedule takes no more FLOPs; None where even the smallest takes more."""
    if shape.flop_share(schedule(STEP)) > flop_share:
        return None
    return round(largest(lambda ratio: shape.flop_share(schedule(ratio)) <= flop_share, STEP, 1.0), 4)


def split(items: Sequence[Item], first: int, then: int) -> tuple[list[Item], list[Item]]:
    """The first so many questions of each task and wording, and so many after those, on other pictures."""
    taken: dict[tuple[str, str], int] = {}
    tuned, rest = [], []
    for item in items:
        key = item.task, item.wording
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= first:
            tuned.append(item)
        elif taken[key] <= first + then:
            rest.append(item)
    seen = {item.media_index for item in tuned}
    return tuned, [item for item in rest if item.media_index not in seen]


def search(args: argparse.Namespace, tasks: Sequence[str]) -> list[Path]:
    """The files of all searches; those that are there already are not searched again."""
    if args.restart:
        shutil.rmtree(FOUND, ignore_errors=True)
    FOUND.mkdir(parents=True, exist_ok=True)
    model = ModelConfig(model="tiny", dtype="float32", num_threads=1, kv_cache_gb=0.5)
    common: dict[str, Any] = {"tasks": tuple(tasks), "limit": args.tune_limit, "model": model, "max_tokens": 192}
    jobs = [
        Tuning(out=FOUND / f"sigmoid-{budget:g}.json", budget=budget, num_trials=args.trials, **common)
        for budget in args.budget
    ]
    jobs.append(Tuning(out=FOUND / "greedy.json", search="greedy", tolerance=args.tolerance, **common))
    for job in jobs:
        run_tuning(job)
    return [job.out for job in jobs]


def compare(files: Sequence[Path], items: Sequence[Item]) -> list[dict[str, Any]]:
    """One row per search and way, each with its distance to the first of the search."""
    config = ModelConfig(
        model="tiny", dtype="float32", num_threads=1, cache_bytes=0, prefix_caching=False, kv_cache_gb=0.5
    )
    bench = Bench(mm.Model(config), frozenset())
    language: Any = bench.engine.family.language
    scorer, known = Scorer(items), dict[str, np.ndarray]()

    def right(spec: str) -> np.ndarray:
        if spec not in known:
            answers = bench.answers(items, spec)
            good = [is_right(answers[item.id][0], (item.answer, *item.accepted), item.scoring) for item in items]
            known[spec] = np.array(good)
        return known[spec]

    rows = []
    for path in files:
        found = json.loads(path.read_text())
        trial = json.loads(path.with_suffix(".trials.jsonl").read_text().splitlines()[1])
        shape = Shape.of(language.config, language.head_dim, trial["num_visual"], trial["num_text"])
        specs = {"none": ("none", 1.0), "mm tune": (read_reducer(str(path)), found["flop_share"])}
        for name, (schedule, spec) in rivals(shape.num_layers).items():
            ratio = ratio_for(shape, schedule, found["flop_share"])
            if ratio is not None:
                specs[name] = spec % ratio, shape.flop_share(schedule(ratio))
        tuned = right(specs["mm tune"][0])
        for way, (spec, flop_share) in specs.items():
            outcomes = right(spec)
            gap = scorer.resampled(tuned) - scorer.resampled(outcomes)
            row = {"search": path.stem, "way": way, "reducer": spec, "flop_share": round(flop_share, 4)}
            row |= {"score": round(scorer.score(outcomes), 4)}
            over = scorer.score(tuned) - scorer.score(outcomes), *interval(gap)
            row |= {"tuned_over": [round(float(value), 4) for value in over]}
            rows.append(row)
            print(row, flush=True)
    return rows


def report_tuning(record: dict[str, Any]) -> str:
    """The table for a page."""
    head = (
        f"Searched with {record['num_tuned']} questions on pictures, compared with {record['num_items']} others on "
        f"other pictures; {record['trials']} curves were tried for each sigmoid, greedy may lose "
        f"{record['tolerance']:.0%} of the answers. Intervals are of the difference on the same questions."
    )
    lines = [
        [
            row["search"],
            row["way"],
            f"`{row['reducer']}`",
            f"{row['flop_share']:.0%}",
            f"{row['score']:.1%}",
            "-" if row["way"] == "mm tune" else points(*row["tuned_over"]),
        ]
        for row in record["rows"]
    ]
    header = ["search", "way", "reducer", "FLOPs of the prefill", "right", "`mm tune` over it, points"]
    return f"{head}\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restart", action="store_true", help="forget what was searched before")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.4, 0.6])
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--tune-limit", type=int, default=8, help="questions of each task and wording to search with")
    parser.add_argument("--limit", type=int, default=30, help="questions after those, to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuning-tiny.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    items = [item for item in choose(read_test_set()) if item.kind == "image"]
    tuned, rest = split(items, args.tune_limit, args.limit)
    files = search(args, list(dict.fromkeys(item.task for item in items)))
    record = {
        "question": "tuning",
        "num_tuned": len(tuned),
        "num_items": len(rest),
        "trials": args.trials,
        "tolerance": args.tolerance,
        "rows": compare(files, rest),
        "machine": facts(),
    }
    args.out.write_text(json.dumps(record) + "\n")
    print(report_tuning(record))


if __name__ == "__main__":
    main()
