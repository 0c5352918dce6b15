"""Put the figures into a model's card: the results of `mm eval`, pictures from outside, and the number of parameters.

The card is README.md in the model's folder. Its text is written by hand. The text between a line `<!-- NAME -->` and
the next `<!-- /NAME -->` is replaced by the table of that name: parameters, bars, tasks, objects, outside. A card need
not have all of them.

    python -m demos.train.card --model mm/models/weights/tiny --evaluation FILE [--outside FILE]
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from serve.evaluation.report import markdown

PARTS = {"tower": "vision_tower", "projector": "multi_modal_projector", "decoder": "language_model"}
BARS = (  # task, group of its items, smallest share of right answers
    ("exist", "all", 0.95),
    ("color", "objects=3+", 0.95),
    ("shape", "objects=3+", 0.95),
    ("size", "objects=3+", 0.95),
    ("where", "all", 0.90),
    ("relation", "all", 0.90),
    ("count", "all", 0.90),
    ("read", "unseen", 0.80),
    ("chart", "unseen", 0.80),
    ("caption", "unseen", 0.60),
    ("clip-happens", "unseen", 0.75),
    ("clip-first", "unseen", 0.75),
)

GROUPS = {"all": "all", "unseen": "wordings not trained", "objects=3+": "3 and more objects"}

Row = Mapping[str, Any]


def parameters(folder: Path) -> str:
    """How many parameters each part has."""
    counts = dict.fromkeys(PARTS, 0)
    for key, tensor in load_file(folder / "model.safetensors").items():
        counts[next(part for part, name in PARTS.items() if name in key)] += tensor.numel()
    size_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    lines = [[part, f"{count:,}"] for part, count in counts.items()]
    lines += [["all", f"{sum(counts.values()):,}"], ["folder on disk", f"{size_bytes / 1e6:.1f} MB"]]
    return markdown(["part", "parameters"], lines)


def bars(rows: Sequence[Row]) -> str:
    """The bar of each task, and whether it is met."""
    by_name = {(row["task"], row["group"]): row for row in rows}
    lines = []
    for task, group, bar in BARS:
        if row := by_name.get((task, group)):
            met = "yes" if row["cells"][0]["exact"] >= bar else "no"
            lines.append([task, GROUPS.get(group, group), f"{bar:.2f}", *_cells(row), met])
    return markdown(["task", "questions", "bar", "items", "right", "95 %", "swapped", "met"], lines)


def tasks(rows: Sequence[Row]) -> str:
    """Every task, in wordings of the training and in others."""
    groups = {group: {row["task"]: row for row in rows if row["group"] == group} for group in ("trained", "unseen")}
    lines = []
    for task in sorted(groups["trained"], key=lambda task: (task.startswith("clip"), task)):
        lines.append([task, *_cells(groups["trained"][task]), *_cells(groups["unseen"][task])])
    header = ["items", "right", "95 %", "swapped"]
    return markdown(["task", *(f"{name}, trained" for name in header), *(f"{name}, unseen" for name in header)], lines)


def objects(rows: Sequence[Row]) -> str:
    """Every task by the number of objects."""
    by_task: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["group"].startswith("objects="):
            number = row["group"].removeprefix("objects=")
            by_task.setdefault(row["task"], {})[number] = f"{row['cells'][0]['exact']:.2f} of {row['items']}"
    numbers = sorted(
        {n for found in by_task.values() for n in found}, key=lambda n: (n.endswith("+"), int(n.rstrip("+")))
    )
    ordered = sorted(by_task, key=lambda task: (task.startswith("clip"), task))
    return markdown(["task", *numbers], [[task, *(by_task[task].get(n, "") for n in numbers)] for task in ordered])


def _cells(row: Row) -> list[str]:
    cell = row["cells"][0]
    low, high = cell["interval"]
    return [str(row["items"]), f"{cell['exact']:.2f}", f"{low:.2f}-{high:.2f}", f"{cell['swapped']['exact']:.2f}"]


def fill(card: str, tables: Mapping[str, str]) -> str:
    """The card with its marked parts filled.

    Raises:
        SystemExit: A table has no markers in the card.
    """
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not place.search(card):
            raise SystemExit(f"the card has no lines <!-- {name} --> and <!-- /{name} -->; write them where it belongs")
        card = place.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", card)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the model's folder, with README.md in it")
    parser.add_argument("--evaluation", type=Path, required=True, help="what mm eval --json wrote")
    parser.add_argument("--outside", type=Path, help="what demos.samples.outside.ask --out wrote")
    args = parser.parse_args()
    rows = json.loads(args.evaluation.read_text())["rows"]
    tables = {"parameters": parameters(args.model), "bars": bars(rows), "tasks": tasks(rows), "objects": objects(rows)}
    if args.outside:
        tables["outside"] = args.outside.read_text().strip()
    card = args.model / "README.md"
    card.write_text(fill(card.read_text(), tables))


if __name__ == "__main__":
    main()
