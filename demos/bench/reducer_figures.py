"""Tables and Pareto plots of what `demos.bench.reducers` measured.

    python -m demos.bench.reducer_figures demos/bench/results/reducers-tiny-image.jsonl
        demos/bench/results/reducers-tiny-video.jsonl --plots docs [--docs docs/reducers.md]

Of each file one table: the mean over tasks of right answers with its 95 % bootstrap interval (resampled by medium) and
as a share of that of `none`; tokens, CPU times and KV bytes beside it; then the tasks one by one at the chosen ratio.
One plot per file: right answers against tokens kept, averaged over layers, and against CPU time to the first token.
`--docs` puts the tables where a page has the markers `<!-- NAME -->` and `<!-- end -->`, NAME being the file's name.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from serve.evaluation.intervals import NUM_RESAMPLES, SEED, Resamples, interval
from serve.evaluation.items import Item, read_test_set
from serve.evaluation.report import markdown

FULL, GOAL = "none", 0.9
"""What the others are measured against, and the share of its right answers that still counts as good."""

TASKS_AT = 0.1
"""The ratio at which tasks are shown one by one, and methods compared with DivPrune."""


class Results:
    """One file of `demos.bench.reducers`.

    Attributes:
        lines: One per method and ratio; those at ratio 1 that were not asked everything are in `same`.
        same: Method to (answers that equal those of `none` at ratio 1, answers compared).
    """

    def __init__(self, path: Path, items: dict[str, Item]) -> None:
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.name, self.settings, self.machine = path.stem, head["settings"], head["machine"]
        full = next(line for line in lines if line["method"] == FULL)
        self.full, self.lines = full, [line for line in lines if line["keep_ratio"] < 1 or line is full]
        self.same = {
            line["method"]: _same(line, full) for line in lines if line["keep_ratio"] == 1 and line is not full
        }
        self._items = [items[item_id] for item_id in full["asked"]]
        self.tasks = list(dict.fromkeys(item.task for item in self._items))
        self._task = np.array([self.tasks.index(item.task) for item in self._items])
        self._media = np.unique([item.media_index for item in self._items], return_inverse=True)[1]
        num_media = int(self._media.max()) + 1
        rng = np.random.default_rng(SEED)
        self._draws = rng.multinomial(num_media, np.full(num_media, 1 / num_media), size=NUM_RESAMPLES)

    def right(self, line: dict[str, Any]) -> np.ndarray:
        """bool (items,)."""
        good = set(line["right"])
        return np.array([item.id in good for item in self._items])

    def score(self, line: dict[str, Any]) -> float:
        """Mean over tasks of right answers."""
        right = self.right(line)
        return float(np.mean([right[self._task == t].mean() for t in range(len(self.tasks))]))

    def scores(self, line: dict[str, Any]) -> np.ndarray:
        """The score in every resample of the media; a task of which a resample has nothing is left out of it."""
        right, weights = self.right(line), self._draws[:, self._media].astype(float)
        shares = []
        for t in range(len(self.tasks)):
            mine = self._task == t
            total = weights[:, mine].sum(axis=1)
            with np.errstate(invalid="ignore"):
                shares.append((weights[:, mine] @ right[mine]) / total)
        return np.nanmean(shares, axis=0)

    def task_share(self, line: dict[str, Any], task: str) -> tuple[float, float, float]:
        """Right answers of one task with the ends of the interval."""
        mine = self._task == self.tasks.index(task)
        draws = Resamples(self._media[mine].tolist(), f"{task} all")
        share = draws.share(self.right(line)[mine])
        return share.value, share.low, share.high

    def at(self, ratio: float) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["keep_ratio"] == ratio and line["method"] != FULL]


def _same(line: dict[str, Any], full: dict[str, Any]) -> tuple[int, int]:
    texts = full["texts"]
    return sum(texts[item_id] == text for item_id, text in line["texts"].items()), len(line["texts"])


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main_table(results: Results) -> str:
    header = ["method", "keep", "kept, mean over layers", "right", "95 %", "of full", "select ms", "prefill", "TTFT"]
    header += ["KV bytes"]
    full_scores, full = results.scores(results.full), results.score(results.full)
    lines = []
    for line in sorted(results.lines, key=lambda line: (-line["keep_ratio"], -results.score(line))):
        cost, score, scores = line["cost"], results.score(line), results.scores(line)
        low, high = interval(scores)
        share = interval(scores / full_scores)
        lines.append(
            [
                line["method"],
                f"{line['kept']:.0%}",
                f"{cost['layers_kept']:.0%}",
                f"{score:.1%}",
                f"{low:.0%}-{high:.0%}",
                f"{score / full:.0%} ({share[0]:.0%}-{share[1]:.0%})",
                f"{1e3 * cost['select']:.1f}",
                f"{cost['prefill_over_none']:.2f}",
                f"{cost['ttft_over_none']:.2f}",
                f"{cost['kv_bytes_over_none']:.2f}",
            ]
        )
    return markdown(header, lines)


def task_table(results: Results, ratio: float = TASKS_AT) -> str:
    """Right answers per task; bold where the interval lies wholly above that of DivPrune."""
    lines = [results.full, *sorted(results.at(ratio), key=results.score, reverse=True)]
    divprune = next((line for line in lines if line["method"] == "divprune"), None)
    rows = []
    for task in results.tasks:
        bound = results.task_share(divprune, task)[2] if divprune else 1.0
        cells = [results.task_share(line, task) for line in lines]
        rows.append([task, *(f"**{value:.0%}**" if low > bound else f"{value:.0%}" for value, low, _ in cells)])
    return markdown(["task", *(line["method"] for line in lines)], rows)


def verdicts(results: Results) -> list[str]:
    """The two bars, and what ratio 1 does."""
    full, at = results.score(results.full), results.at(TASKS_AT)
    good = [line["method"] for line in at if results.score(line) >= GOAL * full]
    said = [f"{len(good)} methods keep {GOAL:.0%} of the full accuracy at {TASKS_AT:.0%}: {', '.join(good) or 'none'}."]
    divprune = next((line for line in at if line["method"] == "divprune"), None)
    if divprune is not None:
        above = [
            f"{line['method']} on {task}"
            for task in results.tasks
            for line in at
            if results.task_share(line, task)[1] > results.task_share(divprune, task)[2]
        ]
        said.append(f"Above DivPrune with disjoint intervals: {', '.join(above) or 'no method on any task'}.")
    if results.same:
        odd = [name for name, (same, total) in results.same.items() if same < total]
        total = next(iter(results.same.values()))[1]
        told = f"all but {', '.join(odd)}" if odd else "every method"
        said.append(f"At keep_ratio 1 {told} gave the answers of `none` to {total} of {total} questions.")
    return said


def report(results: Results) -> str:
    settings, machine = results.settings, results.machine
    head = (
        f"{settings['model']}, {settings['num_items']} questions ({settings['kind']}), the first {settings['limit']} "
        f"of each task and wording, {len(results.tasks)} tasks. CPU time of one thread, float32, {machine['cpu']}: "
        "prefill, TTFT and KV bytes as a share of those of `none` in the same turns, `select` in ms per item."
    )
    parts = [head, main_table(results), *verdicts(results)]
    if results.at(TASKS_AT):
        parts += [f"By task, at {TASKS_AT:.0%} (bold: interval wholly above DivPrune's):", task_table(results)]
    return "\n\n".join(parts)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's markers of this name.

    Raises:
        SystemExit: The page has no such markers.
    """
    old = page.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(f"{page} has no <!-- {name} --> ... <!-- end -->")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old))


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

BASELINES = ("random", "uniform", "pool2")
MARKERS = "osD^vP*Xphd<>8"


def plot(results: Results, path: Path) -> None:
    """Right answers against tokens and against CPU time to the first token; the front is drawn through."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, constrained_layout=True)
    full = results.score(results.full)
    measures = (
        (axes[0], "layers_kept", "visual tokens kept, mean over decoder layers"),
        (axes[1], "ttft_over_none", "CPU time to the first token, none = 1"),
    )
    methods = sorted({line["method"] for line in results.lines} - {FULL})
    colors = pyplot.get_cmap("tab20").colors
    for axis, key, label in measures:
        for i, method in enumerate(methods):
            of = sorted(
                (line for line in results.lines if line["method"] == method), key=lambda line: line["cost"][key]
            )
            style = (
                {"color": "0.6", "linestyle": ":"} if method in BASELINES else {"color": colors[2 * i % 20 + (i > 9)]}
            )
            xs, ys = [line["cost"][key] for line in of], [100 * results.score(line) for line in of]
            axis.plot(xs, ys, marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.2, label=method, **style)
        axis.axhline(100 * full, color="black", linewidth=0.8)
        axis.axhline(100 * GOAL * full, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_xscale("log")
    ticks = [0.05, 0.1, 0.25, 0.5, 1.0]
    axes[0].set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].text(1, 100 * full, "every token ", va="bottom", ha="right", fontsize=9)
    axes[0].text(1, 100 * GOAL * full, f"{GOAL:.0%} of it ", va="bottom", ha="right", fontsize=9)
    axes[0].set_ylabel("right answers, mean over tasks (%)")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{results.settings['model']}: {'pictures' if results.settings['kind'] == 'image' else 'clips'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for one PNG per file")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced")
    args = parser.parse_args()
    items = read_test_set().by_id()
    texts: list[str] = []
    for path in args.files:
        results = Results(path, items)
        texts.append(report(results))
        if args.plots:
            plot(results, args.plots / f"{results.name}.png")
        if args.docs:
            put_into(args.docs, results.name, texts[-1])
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
