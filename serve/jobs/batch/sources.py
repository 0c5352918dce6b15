"""Where rows come from: tables, lists, archives, folders and globs. Rows are read one after the other, never all."""

from __future__ import annotations

import csv
import glob
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mm.errors import MmError, shown
from serve.jobs.batch.rows import REMOTE, Id, Medium, Row, row_of
from serve.jobs.discover import EXTENSIONS, find_items
from serve.jobs.job import JobError

TABLES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar", ".txt", ".arrow")
"""Ends of names of files that hold many rows."""
DATASET_MARKS = ("state.json", "dataset_dict.json", "dataset_info.json")
"""Files of a folder that `datasets` wrote."""
BATCH_ROWS = 32
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The inputs of a job.

    Attributes:
        inputs: As given: files, folders, globs.
        columns: Names of the columns in tables.
        patterns: Names to take from folders of media; empty takes all.
        exclude: The folder of the job's results.
    """

    inputs: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    patterns: tuple[str, ...] = ()
    exclude: str = ""

    def rows(self) -> Iterator[Row]:
        """Every row once, in order. Row numbers are ids where there is one table.

        Raises:
            JobError: An input does not exist, or cannot be read as what its name says.
        """
        files = self.files()
        tables = [file for file in files if is_table(file)]
        for table in tables:
            yield from self._table(table, prefix="" if len(tables) == 1 else f"{os.path.relpath(table)}:")
        if media := [file for file in files if not is_table(file)]:
            yield from self._media(media)

    def files(self) -> list[str]:
        """The inputs with globs resolved, and with the tables of dataset folders in place of these.

        Raises:
            JobError: An input leads nowhere.
        """
        found: list[str] = []
        for text in self.inputs:
            path = os.path.expanduser(text)
            if not os.path.lexists(path) and glob.has_magic(path):
                matches = sorted(glob.glob(path, recursive=True))
            else:
                matches = [path] if os.path.exists(path) else []
            if not matches:
                raise JobError(f"{text} does not exist")
            found += [file for match in matches for file in dataset_files(match)]
        return list(dict.fromkeys(found))

    def count(self) -> int | None:
        """The number of rows where it is cheap to know; None elsewhere."""
        total = 0
        for file in self.files():
            number = _count(file) if is_table(file) else len(self._found([file]))
            if number is None:
                return None
            total += number
        return total

    def _found(self, files: Sequence[str]) -> list[str]:
        found = find_items(files, self.patterns, exclude=self.exclude or None)
        if found.problems:
            raise JobError("; ".join(found.problems[:3]))
        return [item.path for item in found.items]

    def _media(self, inputs: Sequence[str]) -> Iterator[Row]:
        """A row for each picture and clip; its id is its path, relative to the folder that the job runs in."""
        paths = self._found(inputs)
        if not paths:
            raise JobError("no images or clips were found in: " + ", ".join(inputs))
        for path in paths:
            shown_path = os.path.relpath(path)
            shown_path = path if shown_path.startswith("..") else shown_path
            kind = EXTENSIONS[os.path.splitext(path)[1].lower()]
            yield Row(id=shown_path, source=shown_path, media=(Medium(kind=kind, path=path),))

    def _table(self, file: str, prefix: str) -> Iterator[Row]:
        folder = os.path.dirname(os.path.abspath(file))
        for number, values in enumerate(_values(file)):
            row_id: Id = f"{prefix}{number}" if prefix else number
            source = f"{os.path.basename(file)}:{number}"
            if isinstance(values, Row):
                yield values
            elif isinstance(values, BaseException):
                yield Row(id=row_id, source=source, problem=f"row {number} of {file} cannot be read: {values}")
            elif _is_request(values):
                yield _request_row(values, row_id, source)
            else:
                yield row_of(values, self.columns, row_id, source, folder)


def is_table(file: str) -> bool:
    return os.path.isfile(file) and os.path.splitext(file)[1].lower() in TABLES


def dataset_files(path: str) -> list[str]:
    """The Arrow or Parquet files of a folder that `datasets` wrote or the hub has; any other path as it is."""
    if not os.path.isdir(path):
        return [path]
    names = set(os.listdir(path))
    if not names.isdisjoint(DATASET_MARKS):
        arrow = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.arrow"), recursive=True))
        arrow = [file for file in arrow if not os.path.basename(file).startswith("cache-")]
        return arrow or sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True)) or [path]
    if any(os.path.splitext(name)[1].lower() in EXTENSIONS for name in names):
        return [path]  # a folder of pictures, whatever else lies in it
    places = (glob.escape(path), os.path.join(glob.escape(path), "data"))
    return sorted(file for place in places for file in glob.glob(os.path.join(place, "*.parquet"))) or [path]


def _values(file: str) -> Iterator[Mapping[str, Any] | Row | BaseException]:
    """What each row of a table holds, or why it cannot be read."""
    readers = {
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".csv": _csv,
        ".tsv": _csv,
        ".tar": _webdataset,
        ".txt": _list,
    }
    read = readers.get(os.path.splitext(file)[1].lower(), _jsonl)
    try:
        yield from read(file)
    except MmError:
        raise
    except Exception as error:  # each library has its own tree of errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise JobError(f"{file} cannot be read: {reason}") from error


def _parquet(file: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            yield from batch.to_pylist()


def _arrow(file: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(file) as data:
        try:
            reader = pa.ipc.open_stream(data)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(data)
            batches: Iterator[Any] = (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(start, BATCH_ROWS).to_pylist()


def _csv(file: str) -> Iterator[Mapping[str, Any]]:
    with open(file, newline="", encoding="utf-8-sig") as text:
        for values in csv.DictReader(text, delimiter="\t" if file.lower().endswith(".tsv") else ","):
            yield {name: value for name, value in values.items() if name is not None and value not in (None, "")}


def _jsonl(file: str) -> Iterator[Mapping[str, Any] | BaseException]:
    with open(file, "rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                found: object = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError(f"it is {shown(found)} and no object")
            except (ValueError, RecursionError) as error:
                yield error
            else:
                yield cast("dict[str, Any]", found)


def _list(file: str) -> Iterator[Mapping[str, Any]]:
    """A path or an address in each line."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            text = line.strip()
            if text and not text.startswith("#"):
                yield {"id": text, "media": text} if not text.startswith("data:") else {"media": text}


def _webdataset(file: str) -> Iterator[Mapping[str, Any] | Row]:
    """The samples of a tar: files of one name up to its first dot, which stand together."""
    with tarfile.open(file, "r|*") as archive:
        key, media = "", list[Medium]()
        for member in archive:
            if not member.isfile():
                continue
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            own = os.path.join(folder, stem)
            if own != key and media:
                yield Row(id=key, source=f"{os.path.basename(file)}:{key}", media=tuple(media))
                media = []
            key = own
            kind = EXTENSIONS.get(f".{extension.lower()}")
            content = archive.extractfile(member) if kind else None
            if content is not None:
                media.append(Medium(kind=kind, data=content.read(), path=member.name))
        if media:
            yield Row(id=key, source=f"{os.path.basename(file)}:{key}", media=tuple(media))


def _is_request(values: Mapping[str, Any]) -> bool:
    return "custom_id" in values and "body" in values


def _request_row(values: Mapping[str, Any], number: Id, source: str) -> Row:
    """A row of an OpenAI batch."""
    custom_id, url, body = values["custom_id"], values.get("url"), values["body"]
    problem = ""
    if not isinstance(custom_id, str) or not custom_id:
        return Row(id=number, source=source, problem=f"its custom_id was {shown(custom_id)}; it has to be a text")
    if values.get("method") != "POST":
        problem = f"its method was {shown(values.get('method'))}; it has to be POST"
    elif url not in PATHS:
        problem = f"its url was {shown(url)}; allowed: {', '.join(PATHS)}"
    elif not isinstance(body, dict):
        problem = f"its body was {shown(body)}; it has to be an object"
    if problem:
        return Row(id=custom_id, source=source, problem=problem)
    return Row(id=custom_id, source=source, body=cast("dict[str, Any]", body), url=str(url))


def _count(file: str) -> int | None:
    extension = os.path.splitext(file)[1].lower()
    if extension == ".parquet":
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(file).num_rows
        except Exception:  # reported when the rows are read
            return None
    if extension in (".jsonl", ".ndjson", ".txt"):
        with open(file, "rb") as lines:
            return sum(1 for line in lines if line.strip() and not (extension == ".txt" and line.startswith(b"#")))
    return None


def is_rows(path: str) -> bool:
    """Whether an input holds rows: a table, an archive, or a folder of a dataset."""
    return is_table(path) or dataset_files(path) != [path]


__all__ = ["PATHS", "REMOTE", "Source", "dataset_files", "is_rows", "is_table"]
