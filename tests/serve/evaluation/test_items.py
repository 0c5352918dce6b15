"""The Parquet file: what is written is read, media are stored once, and every mistake in a file is named."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve.evaluation.items import EvaluationError, Item, choose, read_test_set, with_swaps, write_test_set
from tests.serve.evaluation.conftest import picture


def columns(**changes) -> dict[str, pa.Array]:
    """Two sound rows, with some columns replaced; None leaves one out."""
    base = {
        "id": pa.array(["a", "b"]),
        "task": pa.array(["color", "color"]),
        "media": pa.array([picture("red"), picture("blue")], pa.binary()),
        "media_type": pa.array(["image/png", "image/png"]),
        "question": pa.array(["Which color?"] * 2),
        "answer": pa.array(["red", "blue"]),
    }
    return {name: column for name, column in (base | changes).items() if column is not None}


def write(path, **changes):
    pq.write_table(pa.table(columns(**changes)), path)
    return path


def test_a_set_is_read_as_it_was_written(file, items):
    assert list(read_test_set(file).items) == items


def test_equal_items_make_equal_files(tmp_path, file, items):
    again = tmp_path / "again.parquet"
    write_test_set(again, items)
    assert again.read_bytes() == file.read_bytes()


def test_a_medium_is_stored_once_however_many_questions_it_has(tmp_path):
    """Also past pyarrow's own limit of 1 MiB for a dictionary, where it would begin to repeat values."""
    media = [os.urandom(8_000) for _ in range(300)]
    items = [
        Item(id=f"{m}-{q}", task="t", media=data, media_type="image/png", media_index=m, question=f"{q}?", answer="x")
        for q in range(5)
        for m, data in enumerate(media)
    ]
    write_test_set(tmp_path / "set.parquet", items)
    size = (tmp_path / "set.parquet").stat().st_size
    assert sum(map(len, media)) < size < 1.05 * sum(map(len, media))
    read = read_test_set(tmp_path / "set.parquet").items
    assert len({id(item.media) for item in read}) == 300


def test_a_plain_file_with_only_the_needed_columns_will_do(tmp_path):
    """As pandas or any other writer makes it: no dictionary, large strings, no optional columns."""
    wide = {name: pa.array(["x", "y"], pa.large_string()) for name in ("id", "question", "answer")}
    table = pa.table(columns(**wide, media=pa.array([picture("red"), picture("blue")], pa.large_binary())))
    pq.write_table(table, tmp_path / "own.parquet", use_dictionary=False)
    first, second = read_test_set(tmp_path / "own.parquet").items
    assert (first.scoring, first.accepted, first.num_objects, first.wording) == ("exact", (), None, "")
    assert (first.swap_id, second.swap_id) == ("y", "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None, "media_type": None}, "lacks the columns 'media_type', 'answer'"),
        ({"id": pa.array(["a", "a"])}, "the id 'a' more than once"),
        ({"media": pa.array(["a.png", "b.png"])}, "'media' is of type string, not binary"),
        ({"media": pa.array([b"", b"x"], pa.binary())}, "row 0: the column 'media' is empty"),
        ({"question": pa.array(["?", " "])}, "row 1: the column 'question' is empty"),
        ({"answer": pa.array(["red", None])}, "row 1: the column 'answer' is empty"),
        ({"media_type": pa.array(["image/png", "audio/wav"])}, "row 1: media_type is 'audio/wav'"),
        ({"scoring": pa.array(["exact", "fuzzy"])}, "row 1: scoring is 'fuzzy'; allowed: exact, verbatim, content"),
        ({"num_objects": pa.array(["one", "two"])}, "'num_objects' is of type string, not int64"),
        ({"swap_id": pa.array(["b", "c"])}, "the swap_id of 'b' is 'c', and no item has that id"),
        ({"swap_id": pa.array(["b", "b"])}, "the swap_id of 'b' is 'b', which has the same medium"),
        (
            {"swap_id": pa.array(["b", "a"]), "media_type": pa.array(["image/png", "video/mp4"])},
            "the swap_id of 'a' is 'b', which has a medium of kind video",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, changes, message):
    with pytest.raises(EvaluationError) as raised:
        read_test_set(write(tmp_path / "bad.parquet", **changes))
    assert message in str(raised.value)
    assert "bad.parquet" in str(raised.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.parquet").write_text("id,task\n1,color\n")
    for name, message in (
        ("absent.parquet", "cannot read"),
        ("text.parquet", "not a Parquet file"),
        ("", "cannot read"),
    ):
        with pytest.raises(EvaluationError, match=message):
            read_test_set(tmp_path / name)
    with pytest.raises(EvaluationError, match="holds no items"):
        read_test_set(write(tmp_path / "empty.parquet", **{name: column[:0] for name, column in columns().items()}))


def test_choosing_by_task_wording_and_limit(file):
    chosen = choose(read_test_set(file), ["color", "exist"], limit=3)
    assert [item.id for item in chosen] == ["color-0", "exist-0", "color-1", "exist-1", "color-2", "exist-2"]
    assert {item.task for item in choose(read_test_set(file), wording="unseen")} == {"exist"}


def test_an_unknown_task_lists_the_tasks(file):
    with pytest.raises(EvaluationError) as raised:
        choose(read_test_set(file), ["colour"])
    assert "no task 'colour'" in str(raised.value)
    assert "did you mean 'color'? (tasks: color, exist, clip-length)" in str(raised.value)
    with pytest.raises(EvaluationError, match="wordings: trained, unseen"):
        choose(read_test_set(file), wording="new")
    with pytest.raises(EvaluationError, match="no items of the tasks exist in the wording 'trained'"):
        choose(read_test_set(file), ["exist"], "trained")


def test_a_swap_is_of_the_same_task_and_kind_and_another_medium(items):
    by_id = {item.id: item for item in items}
    for item in items:
        other = by_id[item.swap_id]
        assert (other.task, other.kind) == (item.task, item.kind)
        assert other.media != item.media


def test_an_item_alone_in_its_task_has_no_swap(items):
    assert with_swaps(items[:1])[0].swap_id is None
