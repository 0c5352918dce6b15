"""The items of an evaluation: one Parquet row each, with the encoded picture or clip inside.

| column      | type         | meaning |
|-------------|--------------|---------|
| id          | string       | unique |
| task        | string       | what the item tests; results are per task |
| media       | binary       | an encoded image or clip, as a file would hold it |
| media_type  | string       | such as image/jpeg or video/mp4 |
| question    | string       | asked after the medium, as it stands |
| answer      | string       | the right answer |
| accepted    | list<string> | further right answers (optional column) |
| scoring     | string       | "exact", "verbatim" or "content", see scoring.py (optional; "exact") |
| num_objects | int          | how many objects are to be seen; results are also by it (optional) |
| wording     | string       | "trained" or "unseen" by the model we ship; any name for other sets (optional) |
| seed        | int          | where the generator drew it from; only for the record (optional) |
| swap_id     | string       | whose medium the control shows instead (optional; chosen when the column is missing) |

Rows that share a medium repeat it: the file stores it once, as Parquet's dictionary encoding does.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet

from mm.data.media import Kind
from mm.errors import MmError, nearest
from serve.evaluation.scoring import Scoring

REQUIRED = ("id", "task", "media", "media_type", "question", "answer")
OPTIONAL: dict[str, Any] = {
    "accepted": (),
    "scoring": "exact",
    "num_objects": None,
    "wording": "",
    "seed": None,
    "swap_id": None,
}
HELD_OUT = "held_out.parquet"


class EvaluationError(MmError):
    """An evaluation cannot start or go on."""

    code = "evaluation_error"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one medium; the module docstring explains the fields.

    Attributes:
        media: Shared between the items that ask about the same medium.
        media_index: Which of the file's different media it is, in order of appearance.
    """

    id: str
    task: str
    media: bytes = field(repr=False)
    media_type: str
    media_index: int
    question: str
    answer: str
    accepted: tuple[str, ...] = ()
    scoring: Scoring = "exact"
    num_objects: int | None = None
    wording: str = ""
    seed: int | None = None
    swap_id: str | None = None

    @property
    def kind(self) -> Kind:
        return "image" if self.media_type.startswith("image/") else "video"


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """Items in the order of the file.

    Attributes:
        name: Name of the file.
        sha256: Of the file, so that results say what they are about.
    """

    __test__ = False  # pytest collects classes of such a name

    name: str
    sha256: str
    items: tuple[Item, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.task for item in self.items))

    def by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}


def held_out_path() -> Path:
    """The set that comes with the package."""
    return Path(str(resources.files("serve.evaluation").joinpath(HELD_OUT)))


def read_test_set(path: Path | None = None) -> TestSet:
    """The items of a Parquet file, by default of the held-out set we ship.

    Raises:
        EvaluationError: The file cannot be read, or is not of the form that the module docstring describes.
    """
    path = path or held_out_path()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data), read_dictionary=["media"])
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaluationError(f"{path} is not a Parquet file that can be read: {_first_line(error)}") from None
    columns = {name: _column(table, name, path) for name in (*REQUIRED, *OPTIONAL) if name in table.column_names}
    if missing := [name for name in REQUIRED if name not in columns]:
        raise EvaluationError(f"{path} lacks {_listed('column', missing)}; it needs {', '.join(REQUIRED)}")
    if not table.num_rows:
        raise EvaluationError(f"{path} holds no items")
    media: dict[bytes, int] = {}
    rows = zip(*columns.values(), strict=True)
    items = [_item(dict(zip(columns, row, strict=True)), media, f"{path}, row {i}") for i, row in enumerate(rows)]
    _check_swaps(items, path)
    if "swap_id" not in columns:
        items = with_swaps(items)
    return TestSet(name=path.name, sha256=hashlib.sha256(data).hexdigest(), items=tuple(items))


def _column(table: pyarrow.Table, name: str, path: Path) -> list[Any]:
    column = table.column(name)
    if name == "media":
        return _shared(column, path)
    target = {
        "num_objects": pyarrow.int64(),
        "seed": pyarrow.int64(),
        "accepted": pyarrow.list_(pyarrow.string()),
    }.get(name, pyarrow.string())
    try:
        return column.cast(target).to_pylist()
    except pyarrow.ArrowException as error:
        problem = f"{path}: the column {name!r} is of type {column.type}, not {target}"
        raise EvaluationError(f"{problem} ({_first_line(error)})") from None


def _shared(column: pyarrow.ChunkedArray, path: Path) -> list[bytes | None]:
    """Bytes of each row; equal ones of a row group are one object."""
    values: list[bytes | None] = []
    for chunk in column.chunks:
        chunk = chunk if pyarrow.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        if chunk.type.value_type not in (pyarrow.binary(), pyarrow.large_binary()):
            raise EvaluationError(
                f"{path}: the column 'media' is of type {chunk.type.value_type}, not binary; "
                "it has to hold the bytes of an image or clip, as its file does"
            )
        distinct = chunk.dictionary.to_pylist()
        values += [None if i is None else distinct[i] for i in chunk.indices.to_pylist()]
    return values


def _item(row: dict[str, Any], media: dict[bytes, int], where: str) -> Item:
    for name, value in row.items():
        if value is None and name in OPTIONAL:
            row[name] = OPTIONAL[name]
        elif value is None or value == b"" or (name in ("id", "task", "question") and not value.strip()):
            raise EvaluationError(f"{where}: the column {name!r} is empty")
    if not row["media_type"].startswith(("image/", "video/")):
        raise EvaluationError(f"{where}: media_type is {row['media_type']!r}; it has to be image/... or video/...")
    if row.get("scoring", "exact") not in get_args(Scoring):
        allowed = ", ".join(get_args(Scoring))
        raise EvaluationError(f"{where}: scoring is {row['scoring']!r}; allowed: {allowed}")
    row["accepted"] = tuple(row.get("accepted", ()))
    return Item(**row, media_index=media.setdefault(row["media"], len(media)))


def _check_swaps(items: Sequence[Item], path: Path) -> None:
    if repeated := [id for id, count in Counter(item.id for item in items).items() if count > 1]:
        raise EvaluationError(f"{path}: {_listed('id', repeated)} more than once; ids have to be unique")
    by_id = {item.id: item for item in items}
    for item in items:
        if item.swap_id is None:
            continue
        other = by_id.get(item.swap_id)
        if other is None:
            raise EvaluationError(f"{path}: the swap_id of {item.id!r} is {item.swap_id!r}, and no item has that id")
        if other.kind != item.kind or other.media_index == item.media_index:
            what = "the same medium" if other.kind == item.kind else f"a medium of kind {other.kind}"
            raise EvaluationError(f"{path}: the swap_id of {item.id!r} is {item.swap_id!r}, which has {what}")


def with_swaps(items: Sequence[Item]) -> list[Item]:
    """The items, each with the `swap_id` of one of its task and kind half a list away, on another medium if any is."""
    swaps: dict[str, str] = {}
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.task, item.kind), []).append(item)
    for group in groups.values():
        for i, item in enumerate(group):
            turned = (group[(i + len(group) // 2 + k) % len(group)] for k in range(len(group)))
            other = next((o for o in turned if o.media_index != item.media_index), None)
            if other is not None:
                swaps[item.id] = other.id
    return [replace(item, swap_id=swaps.get(item.id)) for item in items]


def choose(
    test_set: TestSet, tasks: Iterable[str] = (), wording: str | None = None, limit: int | None = None
) -> list[Item]:
    """Some of the items, in order: of these tasks (all if none is named), of that wording, the first `limit` of each.

    Raises:
        EvaluationError: A task or wording does not occur.
    """
    asked = set(tasks)
    for task in sorted(asked - set(test_set.tasks)):
        known = ", ".join(test_set.tasks)
        raise EvaluationError(f"no task {task!r} in {test_set.name}{nearest(task, test_set.tasks)} (tasks: {known})")
    wordings = sorted({item.wording for item in test_set.items})
    if wording is not None and wording not in wordings:
        known = ", ".join(filter(None, wordings)) or "none named"
        raise EvaluationError(f"no wording {wording!r} in {test_set.name} (wordings: {known})")
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    for item in test_set.items:
        if (asked and item.task not in asked) or wording not in (None, item.wording):
            continue
        taken[item.task, item.wording] += 1
        if limit is None or taken[item.task, item.wording] <= limit:
            chosen.append(item)
    if not chosen:
        raise EvaluationError(
            f"{test_set.name} has no items of the tasks {', '.join(sorted(asked))} in the wording {wording!r}"
        )
    return chosen


def write_test_set(path: Path, items: Sequence[Item]) -> None:
    """One row per item; each medium is stored once. Equal items make equal bytes with equal versions of pyarrow."""
    columns = {
        "id": pyarrow.array([i.id for i in items]),
        "task": pyarrow.array([i.task for i in items]),
        "media": pyarrow.array([i.media for i in items], pyarrow.binary()),
        "media_type": pyarrow.array([i.media_type for i in items]),
        "question": pyarrow.array([i.question for i in items]),
        "answer": pyarrow.array([i.answer for i in items]),
        "accepted": pyarrow.array([list(i.accepted) for i in items], pyarrow.list_(pyarrow.string())),
        "scoring": pyarrow.array([i.scoring for i in items]),
        "num_objects": pyarrow.array([i.num_objects for i in items], pyarrow.int32()),
        "wording": pyarrow.array([i.wording for i in items]),
        "seed": pyarrow.array([i.seed for i in items], pyarrow.int64()),
        "swap_id": pyarrow.array([i.swap_id for i in items], pyarrow.string()),
    }
    total = sum(len(m) for m in {i.media for i in items})
    pyarrow.parquet.write_table(
        pyarrow.table(columns),
        path,
        row_group_size=max(1, len(items)),  # one dictionary, hence each medium once
        dictionary_pagesize_limit=2 * total + (1 << 20),  # past the limit, writers fall back to repeating values
        compression="zstd",
    )


def _listed(noun: str, names: Sequence[str]) -> str:
    plural, more = "s" if len(names) > 1 else "", ", ..." if len(names) > 5 else ""
    return f"the {noun}{plural} {', '.join(map(repr, names[:5]))}{more}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
