"""Tables and Pareto plots of what `demos.bench.reducers` measured.

    python -m demos.bench.reducer_figures demos/bench/results/reducers-tiny-image.jsonl
        demos/bench/results/reducers-tiny-video.jsonl --plots docs [--docs docs/reducers.md]

Of each file one table: the mean over tasks of right answers with its 95 % bootstrap interval (resampled by medium) and
as a share of that of `none`; tokens, CPU times and KV bytes beside it; then, at the chosen ratio, every method against
DivPrune question by question, whose intervals are much narrower than two separate ones, and the tasks one by one.
Sentences say what the tables show, so that no text has to be updated by hand.
One plot per file: right answers against tokens kept, averaged over layers, and against CPU time to the first token.
`--docs` puts the tables where a page has the markers `<!-- NAME -->` and `<!-- end -->`, NAME being the file's name.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from demos.bench.reducer_results import BASE, FULL, GOAL, TASKS_AT, Results
from serve.evaluation.intervals import LEVEL, interval
from serve.evaluation.items import read_test_set
from serve.evaluation.report import markdown

# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main_table(results: Results) -> str:
    header = ["method", "keep", "kept, mean over layers", "right", "95 %", "of full", "encode ms", "select ms"]
    header += ["prefill ms", "TTFT ms", "TTFT of `none`", "KV bytes"]
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
                f"{1e3 * cost['encode']:.0f}",
                f"{1e3 * cost['select']:.1f}",
                f"{1e3 * cost['prefill']:.1f}",
                f"{1e3 * cost['ttft']:.0f}",
                f"{cost['ttft_over_none']:.2f}",
                f"{cost['kv_bytes_over_none']:.2f}",
            ]
        )
    return markdown(header, lines)


def task_table(results: Results, ratio: float = TASKS_AT) -> str:
    """Right answers per task; bold where better than DivPrune question by question, italic where worse."""
    lines = [results.full, *results.at(ratio)]
    base = results.find(BASE, ratio)
    rows = [[task, *(_task_cell(results, line, base, task) for line in lines)] for task in results.tasks]
    return markdown(["task", *(line["method"] for line in lines)], rows)


def _task_cell(results: Results, line: dict[str, Any], base: dict[str, Any] | None, task: str) -> str:
    text = f"{results.task_share(line, task)[0]:.0%}"
    if base is None or line in (base, results.full):
        return text
    _, low, high = results.over(line, base, task)
    return f"**{text}**" if low > 0 else f"_{text}_" if high < 0 else text


def paired_table(results: Results, ratio: float = TASKS_AT) -> str:
    """Every method against DivPrune at the same ratio: the score, and the tasks on which it differs for certain."""
    base = results.find(BASE, ratio)
    if base is None:
        return ""
    full, full_scores, rows = results.score(results.full), results.scores(results.full), []
    for line in results.at(ratio):
        low, high = interval(results.scores(line) / full_scores)
        gaps = {task: results.over(line, base, task) for task in results.tasks}
        better = [f"{task} {points(*gap)}" for task, gap in gaps.items() if gap[1] > 0]
        worse = [f"{task} {points(*gap)}" for task, gap in gaps.items() if gap[2] < 0]
        over = "-" if line is base else points(*results.over(line, base))
        share = f"{results.score(line) / full:.0%} ({low:.0%}-{high:.0%})"
        rows.append([line["method"], share, over, "; ".join(better) or "-", "; ".join(worse) or "-"])
    return markdown(["method", "of full", "over DivPrune", "better on", "worse on"], rows)


def beside_table(one: Results, other: Results) -> str:
    """Methods measured on two models: the share of each one's full score, and the points over DivPrune there."""
    names = [results.settings["model"] for results in (one, other)]
    header = ["method", "keep"] + [f"{name}: {what}" for name in names for what in ("of full", "over DivPrune")]
    full = {id(results): results.scores(results.full) for results in (one, other)}
    rows = []
    for ratio in _ratios(other):
        for line in other.at(ratio):
            cells = []
            for results in (one, other):
                mine, base = results.find(line["method"], ratio), results.find(BASE, ratio)
                if mine is None or base is None:
                    cells += ["-", "-"]
                    continue
                low, high = interval(results.scores(mine) / full[id(results)])
                cells.append(f"{results.score(mine) / results.score(results.full):.0%} ({low:.0%}-{high:.0%})")
                cells.append("-" if mine is base else points(*results.over(mine, base)))
            rows.append([line["method"], f"{ratio:.0%}", *cells])
    return markdown(header, rows)


def report_beside(one: Results, other: Results) -> str:
    kind = "pictures" if other.settings["kind"] == "image" else "clips"
    shares = ", ".join(
        f"{r.settings['model']} {r.score(r.full):.1%} of {r.settings['num_items']} questions" for r in (one, other)
    )
    return f"{kind.capitalize()}; right answers with all tokens: {shares}.\n\n{beside_table(one, other)}"


def points(value: float, low: float, high: float) -> str:
    """A difference of shares with its interval, in points."""
    return f"{100 * value:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def verdicts(results: Results) -> list[str]:
    """What the tables show, sentence by sentence."""
    sentences = [*_good_methods(results), *_against_base(results), *_no_better_than_even(results)]
    sentences += [*_flashvid_or_holitom(results), *_cheapest(results)]
    if results.same:
        odd = [name for name, (same, total) in results.same.items() if same < total]
        total = next(iter(results.same.values()))[1]
        which = f"all but {', '.join(odd)}" if odd else "every method"
        sentences.append(f"At keep_ratio 1 {which} gave the same answers as `none` to {total} of {total} questions.")
    return sentences


def _ratios(results: Results) -> list[float]:
    return sorted({line["keep_ratio"] for line in results.lines} - {1.0}, reverse=True)


MORE = 0.02
"""How much more than its budget a method with a threshold in place of a ratio may keep to be compared at it."""


def _good_methods(results: Results) -> list[str]:
    full, sentences = results.score(results.full), []
    for ratio in _ratios(results):
        within = [line for line in results.at(ratio) if line["kept"] <= ratio + MORE]
        shares = [(line["method"], results.score(line) / full) for line in within]
        good = ", ".join(f"`{method}` {share:.0%}" for method, share in shares if share >= GOAL)
        best = f"none; best is `{shares[0][0]}` with {shares[0][1]:.0%}"
        sentences.append(f"At {ratio:.0%} of the tokens these keep {GOAL:.0%} of the full score: {good or best}.")
    return sentences


def _against_base(results: Results) -> list[str]:
    base = results.find(BASE, TASKS_AT)
    if base is None:
        return []
    others = [line for line in results.at(TASKS_AT) if line is not base]
    apart = [
        f"`{line['method']}` on {task}"
        for task in results.tasks
        for line in others
        if results.task_share(line, task)[1] > results.task_share(base, task)[2]
    ]
    better = [f"`{line['method']}` by {points(*gap)}" for line in others if (gap := results.over(line, base))[1] > 0]
    num_gaps = len(others) * len(results.tasks)
    return [
        f"At {TASKS_AT:.0%}, better than DivPrune with disjoint intervals: "
        f"{', '.join(apart) or 'no method on any task'}.",
        f"Better than DivPrune question by question, in points over all tasks: {', '.join(better) or 'no method'}. "
        f"The tables show each task; by chance alone {num_gaps * (1 - LEVEL) / 2:.0f} of {num_gaps} comparisons would "
        "look better.",
    ]


def _no_better_than_even(results: Results) -> list[str]:
    even = results.find("uniform", TASKS_AT)
    if even is None:
        return []
    poor = [line["method"] for line in results.at(TASKS_AT) if results.over(line, even)[1] <= 0 and line is not even]
    listed = ", ".join(f"`{method}`" for method in poor) or "no method"
    return [f"At {TASKS_AT:.0%}, not clearly better than evenly spread tokens (`uniform`): {listed}."]


def _flashvid_or_holitom(results: Results) -> list[str]:
    parts = []
    for ratio in _ratios(results):
        one, other = results.find("flashvid", ratio), results.find("holitom", ratio)
        if one and other:
            gap = points(*results.over(one, other))
            parts.append(f"at {ratio:.0%} {gap}, with {one['kept']:.1%} of the tokens in place of {other['kept']:.1%}")
    return [f"FlashVID over HoliTom, in points: {'; '.join(parts)}."] if parts else []


def _cheapest(results: Results) -> list[str]:
    sentences = []
    for key, what in (("ttft_over_none", "time to the first token"), ("kv_bytes_over_none", "bytes in the cache")):
        parts = []
        for ratio in _ratios(results):
            least = min(results.at(ratio), key=lambda line: (line["cost"][key], -results.score(line)))
            parts.append(f"{ratio:.0%} `{least['method']}` {least['cost'][key]:.2f}")
        sentences.append(f"Least {what}, `none` = 1: {', '.join(parts)}.")
    return sentences


def _learned(results: Results) -> str:
    named = {line["method"]: line["weights"] for line in results.lines if line.get("weights")}
    listed = ", ".join(f"`{method}` {weights.partition('@')[2][:8]}" for method, weights in named.items())
    return f" Weights of learned reducers: {listed}." if listed else ""


def report(results: Results) -> str:
    settings, machine = results.settings, results.machine
    head = (
        f"{settings['model']}, {settings['num_items']} questions ({settings['kind']}), the first {settings['limit']} "
        f"of each task and wording, {len(results.tasks)} tasks, weights {settings['weights'][:8]}. CPU time of one "
        f"thread, float32, {machine['cpu']}. `encode` is the tower with what the method needs of it; TTFT is encoding, "
        "selecting and prefill. The last two columns are shares of `none` in the same rounds." + _learned(results)
    )
    parts = ["\n".join(f"- {sentence}" for sentence in verdicts(results)), head, main_table(results)]
    if results.at(TASKS_AT):
        parts += [
            f"Against DivPrune at {TASKS_AT:.0%}, in points, with 95 % intervals of differences on the same questions:",
            paired_table(results),
            f"By task, at {TASKS_AT:.0%} (bold: better than DivPrune on the same questions, italic: worse):",
            task_table(results),
        ]
    return "\n\n".join(part for part in parts if part)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace the text between a page's markers of this name.

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
