"""Plot a run's curves, held-out answers teacher-forced, and print what evaluate.py found as a table.

python -m demos.train.curves --run RUN --out mm/models/weights/tiny/curves.png     Needs: matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOWER_LINES = ("shape", "color", "size", "cell", "char1", "index", "extreme", "cls_ap")
DECODER_LINES = ("color", "where", "exist", "relation", "count", "read", "chart", "number", "caption")
DECODER_LINES += ("clip happens", "clip first", "clip direction")
UNSEEN_LINES = ("color", "where", "exist", "count", "read", "chart", "clip happens")


def read_records(path: Path) -> list[dict]:
    """Records in order; where a run was resumed, the later record of a step counts."""
    by_key = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        by_key[(record["step"], "held_out" in record, "train" in record)] = record
    return sorted(by_key.values(), key=lambda r: r["step"])


def draw(axes: plt.Axes, records: list[dict], names: tuple[str, ...], title: str, unseen: tuple[str, ...] = ()) -> None:
    """Held-out accuracy; dotted, in the same color, in wordings that training never uses."""
    points = [r for r in records if "held_out" in r]
    colors = plt.get_cmap("tab20").colors
    for name, color in zip(names, colors[::2] + colors[1::2], strict=False):
        values = [r["held_out"].get(name) for r in points]
        (line,) = axes.plot([r["step"] for r in points], values, label=name, color=color)
        if name in unseen:
            values = [r.get("unseen", {}).get(name) for r in points]
            axes.plot([r["step"] for r in points], values, ":", color=line.get_color())
    axes.set(title=title, xlabel="step", ylim=(0, 1))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)


def smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vit, lm = read_records(args.run / "vit.jsonl"), read_records(args.run / "lm.jsonl")
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), constrained_layout=True)
    losses = [r for r in vit if "loss" in r]
    axes[0, 0].plot([r["step"] for r in losses], smooth([r["loss"] for r in losses]))
    axes[0, 0].set(title="tower: training loss", xlabel="step", ylim=(0, 25))
    draw(axes[0, 1], vit, TOWER_LINES, "tower: held-out patches")
    for clip, name in ((False, "images"), (True, "clips")):
        part = [r for r in lm if r.get("clip") is clip]
        axes[1, 0].plot([r["step"] for r in part], smooth([r["answer_loss"] for r in part]), label=name)
    axes[1, 0].set(title="decoder: answer loss", xlabel="step", ylim=(0, 2.5))
    axes[1, 0].legend()
    title = "decoder: held-out answers (dotted: unseen wordings)"
    draw(axes[1, 1], lm, DECODER_LINES, title, UNSEEN_LINES)
    figure.savefig(args.out, dpi=80)
    for evaluation in sorted(args.run.glob("evaluation*.json")):
        print(f"\n{evaluation.name}\n")
        print("| task | items | exact | 95 % | swapped picture |\n|---|---|---|---|---|")
        for name, row in json.loads(evaluation.read_text())["tasks"].items():
            low, high = row["interval"]
            print(f"| {name} | {row['items']} | {row['accuracy']:.2f} | {low:.2f}-{high:.2f} | {row['swapped']:.2f} |")


if __name__ == "__main__":
    main()
