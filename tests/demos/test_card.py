"""The card's tables hold the figures of the evaluation, each in its marked place."""

import json
from pathlib import Path

import pytest

from demos.train import card

ROOT = Path(__file__).parents[2]


def row(task: str, group: str, exact: float, items: int = 40) -> dict:
    share = {"exact": exact, "interval": [exact - 0.1, exact + 0.05]}
    return {"task": task, "group": group, "items": items, "cells": [{**share, "swapped": {"exact": 0.25}}]}


def test_a_bar_is_met_from_its_own_figure_on():
    table = card.bars([row("exist", "all", 0.95), row("read", "unseen", 0.79), row("read", "all", 0.9)])
    met, missed = table.splitlines()[2:]
    assert [cell.strip() for cell in met.split("|")[1:-1]] == [
        *("exist", "all", "0.95", "40", "0.95", "0.85-1.00", "0.25", "yes")
    ]
    assert "wordings not trained" in missed
    assert missed.endswith("| no  |")


def test_tasks_on_pictures_come_before_those_on_clips():
    rows = [row(t, g, e) for t in ("clip-first", "read") for g, e in (("trained", 0.5), ("unseen", 0.25))]
    names = [line.split("|")[1].strip() for line in card.tasks(rows).splitlines()]
    assert names == ["task", "----------", "read", "clip-first"]


def test_objects_are_in_order_with_many_last():
    rows = [row("count", f"objects={n}", 0.5) for n in ("3+", "10", "2", "1")]
    header = [cell.strip() for cell in card.objects(rows).splitlines()[0].split("|")[1:-1]]
    assert header == ["task", "1", "2", "10", "3+"]


def test_only_what_is_between_the_marks_is_replaced():
    before = "a\n<!-- bars -->\nold | table\n<!-- /bars -->\nb\n<!-- tasks -->\nstays\n<!-- /tasks -->\n"
    once = card.fill(before, {"bars": r"new \1 table"})
    assert once == before.replace("old | table\n", "\nnew \\1 table\n\n")
    assert card.fill(once, {"bars": r"new \1 table"}) == once
    with pytest.raises(SystemExit, match="outside"):
        card.fill(before, {"outside": "x"})


@pytest.mark.parametrize("name", ["tiny", "tiny_plain"])
def test_the_shipped_card_tells_its_own_evaluation(name):
    folder = ROOT / "mm" / "models" / "weights" / name
    result = json.loads((ROOT / "demos" / "bench" / "results" / f"eval-{name}.json").read_text())
    text = (folder / "README.md").read_text()
    for table in (card.bars(result["rows"]), card.tasks(result["rows"]), card.objects(result["rows"])):
        assert table in text
    assert card.parameters(folder) in text
