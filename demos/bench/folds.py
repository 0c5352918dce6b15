"""Is the order of the reduction methods the same on three disjoint parts of the held-out set, and does reduction hurt?

Every registered reducer with a `keep_ratio`, and `none`, answers the held-out questions on pictures at each budget. The
pictures are split into three folds, so no picture is in two. A method's score is the mean over tasks of its exact
match, so that no task counts for more because it has more questions. Prints tables, then one JSON line.

    python -m demos.bench.folds [--model tiny] [--keep 0.25 0.1 0.05] [--limit N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from demos.bench.machine import facts
from mm.config import ModelConfig
from mm.errors import PluginError
from mm.plugins.registry import get, names, options_of
from mm.plugins.spec import build_reducer
from serve.evaluation.intervals import NUM_RESAMPLES, SEED, Resamples, interval
from serve.evaluation.items import Item, choose, read_test_set
from serve.evaluation.local import LocalBackend
from serve.evaluation.report import markdown, progress
from serve.evaluation.run import ask_items, num_questions

NUM_FOLDS = 3
READING = "read"
READING_KEEP, READING_BAR = 0.1, 0.4
"""What `random` at this budget has to cost on reading, so that the curves mean something."""


def methods() -> list[str]:
    """Registered reducers that take a keep_ratio."""
    return [name for name in names("reducer") if "keep_ratio" in options_of(get("reducer", name))]


def folds_of(items: Sequence[Item]) -> np.ndarray:
    """The fold of each item; that of its picture."""
    media = sorted({item.media_index for item in items})
    fold = {index: i % NUM_FOLDS for i, index in enumerate(media)}
    return np.array([fold[item.media_index] for item in items])


class Scorer:
    """Mean over tasks of the share of right answers, on all items or some, and in resamples of the pictures."""

    def __init__(self, items: Sequence[Item]) -> None:
        tasks = list(dict.fromkeys(item.task for item in items))
        self.task = np.array([tasks.index(item.task) for item in items])
        self.media = np.unique([item.media_index for item in items], return_inverse=True)[1]
        rng, num_media = np.random.default_rng(SEED), self.media.max() + 1
        self.draws = rng.multinomial(num_media, np.full(num_media, 1 / num_media), size=NUM_RESAMPLES)

    def score(self, right: np.ndarray, chosen: np.ndarray | None = None) -> float:
        chosen = np.ones(len(right), bool) if chosen is None else chosen
        shares = [right[chosen & (self.task == t)].mean() for t in np.unique(self.task[chosen])]
        return float(np.mean(shares))

    def resampled(self, right: np.ndarray) -> np.ndarray:
        """The score in every resample; methods are resampled alike, so differences may be taken."""
        shares = []
        for t in np.unique(self.task):
            of_task = self.task == t
            hits = np.bincount(self.media[of_task], right[of_task], self.draws.shape[1])
            counts = np.bincount(self.media[of_task], minlength=self.draws.shape[1])
            shares.append((self.draws @ hits) / np.maximum(self.draws @ counts, 1))
        return np.mean(shares, axis=0)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    array = np.asarray(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, nan where all of one side is tied."""
    a, b = ranks(one), ranks(other)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def compare(keep: float, right: dict[str, np.ndarray], scorer: Scorer, folds: np.ndarray) -> dict:
    """One budget: scores by fold, their order, and which pairs of methods differ significantly."""
    rows = {}
    for name, outcomes in right.items():
        low, high = interval(scorer.resampled(outcomes))
        by_fold = [scorer.score(outcomes, folds == fold) for fold in range(NUM_FOLDS)]
        rows[name] = {"all": scorer.score(outcomes), "interval": [low, high], "folds": by_fold}
    order = sorted(rows, key=lambda name: -rows[name]["all"])
    orders = [sorted(rows, key=lambda name: -rows[name]["folds"][fold]) for fold in range(NUM_FOLDS)]
    columns = [[rows[name]["folds"][fold] for name in order] for fold in range(NUM_FOLDS)]
    pairs = []
    for better, worse in combinations(order, 2):
        gap = scorer.resampled(right[better]) - scorer.resampled(right[worse])
        low, high = interval(gap)
        in_folds = [rows[better]["folds"][f] - rows[worse]["folds"][f] for f in range(NUM_FOLDS)]
        pairs.append(
            {
                "better": better,
                "worse": worse,
                "gap": rows[better]["all"] - rows[worse]["all"],
                "interval": [low, high],
                "told_apart": bool(low > 0),
                "same_in_all_folds": all(g > 0 for g in in_folds),
            }
        )
    return {
        "keep_ratio": keep,
        "order": order,
        "rows": rows,
        "same_order_in_all_folds": all(o == order for o in orders),
        "rank_correlation": [rank_correlation(a, b) for a, b in combinations(columns, 2)],
        "resamples_with_this_order": order_share(order, right, scorer),
        "pairs": pairs,
        "told_apart_hold_in_all_folds": all(p["same_in_all_folds"] for p in pairs if p["told_apart"]),
    }


def order_share(order: list[str], right: dict[str, np.ndarray], scorer: Scorer) -> float:
    """Share of resamples in which the methods come in this order."""
    scores = np.stack([scorer.resampled(right[name]) for name in order])
    return float((np.diff(scores, axis=0) <= 0).all(axis=0).mean())


def reading_cost(items: Sequence[Item], none: np.ndarray, random: np.ndarray) -> dict:
    """What `random` loses on reading."""
    chosen = [i for i, item in enumerate(items) if item.task == READING]
    draws = Resamples([items[i].media_index for i in chosen], f"{READING} folds")
    loss = draws.difference(none[chosen], random[chosen])
    return {
        "items": len(chosen),
        "none": float(none[chosen].mean()),
        "random": float(random[chosen].mean()),
        "loss": loss.value,
        "interval": [loss.low, loss.high],
        "bar": READING_BAR,
        "met": loss.value >= READING_BAR,
    }


# ── report ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(result: dict) -> str:
    lines = [f"{result['num_items']} questions on {result['num_media']} pictures; `none`: {result['none']:.3f}"]
    for budget in result["budgets"]:
        rows = [
            [
                name,
                f"{row['all']:.3f}",
                f"{row['interval'][0]:.3f}-{row['interval'][1]:.3f}",
                *(f"{score:.3f}" for score in row["folds"]),
            ]
            for name in budget["order"]
            if (row := budget["rows"][name])
        ]
        table = markdown(["method", "all", "95 %", *(f"fold {f + 1}" for f in range(NUM_FOLDS))], rows)
        correlations = ", ".join(f"{c:.2f}" for c in budget["rank_correlation"])
        apart = [f"{p['better']} > {p['worse']}" for p in budget["pairs"] if p["told_apart"]]
        close = [f"{p['better']} ~ {p['worse']}" for p in budget["pairs"] if not p["told_apart"]]
        lines += [
            f"\n{budget['keep_ratio']:.0%} of the tokens kept\n\n{table}\n",
            f"same order in all folds: {'yes' if budget['same_order_in_all_folds'] else 'no'}; "
            f"rank correlation of the folds: {correlations}; "
            f"in {budget['resamples_with_this_order']:.0%} of the resamples the order is the same",
            f"clearly different on all pictures: {', '.join(apart) or 'none'}; "
            f"each holds in every fold: {'yes' if budget['told_apart_hold_in_all_folds'] else 'no'}",
            f"no clear difference: {', '.join(close) or 'none'}",
        ]
    if reading := result["reading"]:
        low, high = reading["interval"]
        lost = f"loss {reading['loss']:.3f} ({low:.3f}-{high:.3f}), wanted at least {READING_BAR}"
        lines.append(
            f"\nreading ({reading['items']} questions): none {reading['none']:.3f}, random at {READING_KEEP:.0%} "
            f"{reading['random']:.3f}, {lost}: {'met' if reading['met'] else 'NOT met'}"
        )
    lines += [f"left out: {problem}" for problem in result["left_out"]]
    return "\n".join(lines)


def usable(candidates: Sequence[str], model: str, items: Sequence[Item]) -> tuple[list[str], list[str]]:
    """Methods that this model can use, and why it cannot use the others."""
    good, problems = [], []
    backend = LocalBackend(ModelConfig(model=model, num_threads=1), num_frames=16, max_tokens=4)
    for name in candidates:
        try:
            build_reducer(f"{name}:keep_ratio=0.5")
            ask_items(items[:1], {}, backend, f"{name}:keep_ratio=0.5", control=False)
            good.append(name)
        except PluginError as error:
            problems.append(str(error))
    return good, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, help="Parquet file; the shipped set by default")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.1, 0.05])
    parser.add_argument("--method", nargs="+", help="all registered ones by default")
    parser.add_argument("--limit", type=int, help="the first so many items of each task and wording")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    test_set = read_test_set(args.data)
    items = [item for item in choose(test_set, limit=args.limit) if item.kind == "image"]
    found, left_out = usable(args.method or methods(), args.model, items)
    backend = LocalBackend(ModelConfig(model=args.model, num_threads=1), num_frames=16, max_tokens=192)
    specs = ["none", *(f"{name}:keep_ratio={keep}" for keep in args.keep for name in found)]
    right = {}
    with progress(num_questions(items, specs, control=False)) as advance:
        for spec in specs:
            column = ask_items(items, {}, backend, spec, control=False, advance=advance)
            right[spec] = np.array(column.right)
    scorer, folds = Scorer(items), folds_of(items)
    budgets = [
        compare(keep, {name: right[f"{name}:keep_ratio={keep}"] for name in found}, scorer, folds) for keep in args.keep
    ]
    random = right.get(f"random:keep_ratio={READING_KEEP}")
    has_reading = random is not None and any(item.task == READING for item in items)
    result = {
        "question": "folds",
        "model": args.model,
        "data": {"name": test_set.name, "sha256": test_set.sha256, "limit": args.limit},
        "num_items": len(items),
        "num_media": len({item.media_index for item in items}),
        "none": scorer.score(right["none"]),
        "budgets": budgets,
        "reading": reading_cost(items, right["none"], random) if has_reading else None,
        "left_out": left_out,
        "machine": facts(),
    }
    text = (
        f"$ python -m demos.bench.folds {' '.join(sys.argv[1:])}\n\n{report(result)}\n\n{json.dumps(rounded(result))}\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


def rounded(value: object) -> object:
    """Floats of nested data with four digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
