"""Put the figures of config.json into the cards of trained reducers: README.md beside the weights.

The text of a card is written by hand. What stands between a line `<!-- NAME -->` and the next `<!-- /NAME -->` is
replaced by the table of that name: variants, tasks. The figures are those that `--evaluate` of the training wrote.

    python -m demos.train.reducer_card mm/models/weights/tiny/reducers/dynamic [FOLDER ...]
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from serve.evaluation.report import markdown

Figures = dict[str, Any]
FEW_BUDGET = ", 3 frames per cube"


def is_variant(figures: object) -> bool:
    return isinstance(figures, dict) and ("pictures" in figures or "tokens_per_frame" in figures)


def interval(values: list[float]) -> str:
    """A difference and its 95 % interval."""
    mean, low, high = values
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def dynamic_variants(found: Figures) -> str:
    """Every variant: accuracy on pictures, and shares of the cache."""
    rows = []
    for name, one in found.items():
        if not is_variant(one):
            continue
        cache = one.get("cache", {})
        shares = [f"{cache[part]:.2f}" if cache else "" for part in ("generated", "whole")]
        difference = found.get(f"{name} - none")
        rows.append([name, f"{one['pictures']['mean']:.3f}", interval(difference) if difference else "", *shares])
    head = ["variant", "pictures", "difference", "cache, generated", "cache, whole"]
    prompt, share = found["prompt"], found["prefill_flops_share"]
    others = f"{prompt['visual']} visual tokens, {prompt['text']} others on average, the predictor's own included"
    return f"{markdown(head, rows)}\n\nFLOPs of the prefill: {share:.1%} of those without dropping ({others})."


def dynamic_tasks(found: Figures) -> str:
    """The tasks of pictures and of clips, for a few variants."""
    columns = ["none", "dynamic", "dynamic, image only", "dynamic, output only"]
    parts = []
    for kind in ("pictures", "clips"):
        tasks = [task for task in found["none"][kind] if task != "mean"]
        rows = [[task, *(f"{found[one][kind][task]:.2f}" for one in columns)] for task in tasks]
        parts.append(markdown([kind, *columns], rows))
    return "\n\n".join(parts)


def cube_variants(found: Figures) -> str:
    """Every variant: accuracy on event tasks and on all, where borders are, and what cubes gain over uniform ones."""
    rows = []
    for name, one in found.items():
        if not is_variant(one):
            continue
        near = [f"{one['borders'][part]:.2f}" if "borders" in one else "" for part in ("events", "clips")]
        rows.append([name, f"{one['tokens_per_frame']:.1f}", f"{one['events']:.3f}", f"{one['mean']:.3f}", *near])
    table = markdown(["variant", "tokens per frame", "events", "all", "borders: events", "borders: clips"], rows)
    gains = [f"- {name}: {interval(one)}" for name, one in found.items() if " - " in name]
    return table + "\n\n" + "\n".join(gains)


def cube_tasks(found: Figures) -> str:
    """Every task with cubes, with uniform ones and without."""
    columns = {"cubes": f"cubes{FEW_BUDGET}", "uniform": f"uniform{FEW_BUDGET}", "none": "none"}
    tasks = [task for task in found["none"] if task.startswith("clip ")]
    rows = [[task.removeprefix("clip "), *(f"{found[one][task]:.2f}" for one in columns.values())] for task in tasks]
    return markdown(["task", *columns], rows)


TABLES = {
    "dynamic": {"variants": dynamic_variants, "tasks": dynamic_tasks},
    "cubes": {"variants": cube_variants, "tasks": cube_tasks},
}


def write(folder: Path) -> None:
    """Remake the tables of one card.

    Raises:
        SystemExit: The reducer has no tables, or the card no place for one.
    """
    card = json.loads((folder / "config.json").read_text())
    if card["reducer"] not in TABLES:
        raise SystemExit(f"{folder} is of {card['reducer']!r}; there are tables for {', '.join(TABLES)}")
    page = folder / "README.md"
    text = page.read_text()
    for name, table in TABLES[card["reducer"]].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no <!-- {name} --> ... <!-- /{name} -->")
        made = table(card["trained"]["held_out"])
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+", help="of a trained reducer")
    for folder in parser.parse_args().folder:
        write(folder)


if __name__ == "__main__":
    main()
