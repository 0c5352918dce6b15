"""An evaluation with a fake model: who is asked what, and what is made of the answers."""

from __future__ import annotations

import dataclasses
import itertools

from serve.evaluation.report import tables
from serve.evaluation.run import answer_lines, ask_items, num_questions, result_of
from tests.serve.evaluation.conftest import FakeBackend


def result(items, reducers=(None,), **options):
    backend, by_id = FakeBackend(), {item.id: item for item in items}
    columns = [ask_items(items, by_id, backend, reducer, **options) for reducer in reducers]
    data = {"name": "set", "sha256": "0" * 64, "num_items": len(items), "num_media": 6}
    return result_of(items, columns, data=data, backend=backend.metadata()), columns, backend


def row(result, task, group="all"):
    return next(row for row in result["rows"] if (row["task"], row["group"]) == (task, group))


def test_answers_are_counted_by_task_wording_and_number_of_objects(items):
    found, _, _ = result(items)
    assert row(found, "color")["cells"][0]["exact"] == 1.0
    assert row(found, "exist")["cells"][0] | {"interval": [], "swapped": {}} == {
        "right": 1,
        "exact": 0.25,
        "interval": [],
        "swapped": {},
    }
    assert row(found, "clip-length")["cells"][0]["right"] == 0
    assert row(found, "color", "objects=1")["items"] == 2
    assert [r["group"] for r in found["rows"] if r["task"] == "exist"] == ["all", "objects=1", "objects=2"]


def test_pictures_of_many_objects_are_also_counted_together(items):
    more = [dataclasses.replace(item, num_objects=2 + item.media_index) for item in items if item.task == "color"]
    found, _, _ = result(more)
    assert [(r["group"], r["items"]) for r in found["rows"]] == [
        ("all", 4),
        *((f"objects={n}", 1) for n in (2, 3, 4, 5)),
        ("objects=3+", 3),
    ]
    header = next(line for line in tables(found).splitlines() if "3+" in line)
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["task", "2", "3", "4", "5", "3+"]


def test_the_control_shows_another_medium_and_asks_the_same(items):
    found, columns, backend = result(items)
    assert row(found, "color")["cells"][0]["swapped"]["exact"] == 0.0
    assert row(found, "exist")["cells"][0]["swapped"]["exact"] == 0.25  # what it says to everything
    by_id = {item.id: item for item in items}
    control = backend.asked[len(items) :]
    assert len(control) == len(items)
    for _, ask in control:
        assert ask.question == by_id[ask.item_id].question
        assert ask.media == by_id[by_id[ask.item_id].swap_id].media
    assert columns[0].swapped_replies[0].text.strip().casefold() != "red."


def test_media_are_asked_about_one_after_the_other(items):
    """So that a feature cache need not hold them all."""
    _, _, backend = result(items[::-1])
    for half in (backend.asked[: len(items)], backend.asked[len(items) :]):
        media = [ask.media for _, ask in half]
        changes = sum(a != b for a, b in itertools.pairwise(media))
        assert changes == len(set(media)) - 1


def test_no_control_when_it_is_not_wanted(items):
    found, columns, backend = result(items, control=False)
    assert len(backend.asked) == len(items) == num_questions(items, [None], control=False)
    assert "swapped" not in row(found, "color")["cells"][0]
    assert columns[0].swapped_right == (None,) * len(items)
    assert num_questions(items, [None, "blind"]) == 4 * len(items)


def test_a_control_may_show_a_medium_that_is_not_among_the_items_asked(items):
    by_id = {item.id: item for item in items}
    column = ask_items(items[:1], by_id, FakeBackend(), None)
    assert column.right == (True,)
    assert column.swapped_right == (False,)


def test_an_item_without_a_swap_is_asked_once(items):
    lonely = [dataclasses.replace(items[0], swap_id=None), *items[1:]]
    found, columns, backend = result(lonely)
    assert len(backend.asked) == 2 * len(items) - 1 == num_questions(lonely, [None])
    assert columns[0].swapped_right[0] is None
    assert row(found, "color")["cells"][0]["swapped"]["exact"] == 0.0


def test_reducers_are_columns_compared_pair_by_pair(items):
    found, _, _ = result(items, [None, "blind"])
    assert [c["kept_share"] for c in found["columns"]] == [1.0, 0.25]
    sharp, blind = row(found, "color")["cells"]
    assert (sharp["exact"], blind["exact"], blind["over_first"]["exact"]) == (1.0, 0.0, -1.0)
    assert "over_first" not in sharp


def test_a_cell_does_not_depend_on_which_others_are_asked(items):
    whole, _, _ = result(items, ["blind", None])
    part, _, _ = result([item for item in items if item.task == "exist"])
    assert row(whole, "exist")["cells"][1] | {"over_first": 0} == row(part, "exist")["cells"][0] | {"over_first": 0}


def test_the_suffix_follows_every_question(items):
    _, _, backend = result(items, suffix="In one word.")
    assert {ask.question for _, ask in backend.asked} >= {"Is it red? In one word."}
    assert all(ask.question.endswith("? In one word.") for _, ask in backend.asked)


def test_the_table_shows_what_was_counted(items):
    found, columns, _ = result(items, [None, "blind"])
    text = tables(found)
    line = next(line for line in text.splitlines() if line.startswith("| color"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["color", "all", "4", "1.00"]
    assert cells[6] == "0.00"
    assert "blind (kept 25%)" in text
    widths = {len(line) for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1
    lines = list(answer_lines(items, columns))
    assert len(lines) == 2 * len(items)
    assert lines[0]["answer"] == " RED."
    assert lines[0]["right"] is True
