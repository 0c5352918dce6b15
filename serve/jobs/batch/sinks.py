"""The forms in which shards of records are written and read again. A shard is written whole, then renamed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from serve.jobs.discover import EXTENSIONS
from serve.jobs.job import JobError

Record = dict[str, Any]
FORMATS = ("jsonl", "parquet", "webdataset", "txt", "json", "openai")


class Sink(Protocol):
    """A form of shards.

    Attributes:
        suffix: End of their names.
        needs_media: Whether records carry the bytes of their media, under `MEDIA`.
    """

    suffix: str
    needs_media: bool

    def write(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Write a file that did not exist."""
        ...

    def read(self, path: Path) -> Iterator[Record]:
        """The records of a shard."""
        ...


SECONDS = ("start_s", "end_s")
"""Fields of a record about a window of a clip."""
MEDIA = "media"
"""Field of a record with the bytes of its media, which no table has."""


class JsonLines:
    """One object a line."""

    suffix, needs_media = ".jsonl", False

    def write(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        with open(path, "wb") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: Path) -> Iterator[Record]:
        with open(path, "rb") as lines:
            for line in lines:
                yield json.loads(line)


class Parquet:
    """Columns of plain types, the same in every shard: counts are whole numbers, ids as they are, the rest text."""

    suffix, needs_media = ".parquet", False

    def write(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(dict.fromkeys(name for record in records for name in record))
        id_type = pa.int64() if isinstance(records[0]["id"], int) else pa.string()
        types = {name: id_type if name in ("id", "same_as") else _type(name) for name in names}
        columns = {name: pa.array([_cell(record.get(name)) for record in records], types[name]) for name in names}
        with open(path, "wb") as file:
            pq.write_table(pa.table(columns), file)
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: Path) -> Iterator[Record]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()


def _type(name: str) -> Any:
    import pyarrow as pa

    return pa.int64() if name.startswith("num_") else pa.float64() if name in SECONDS else pa.string()


def _cell(value: Any) -> Any:
    """A value of a column; lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


class WebDataset:
    """A tar with the media, their text and their record, under one key each."""

    suffix, needs_media = ".tar", True

    def write(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        with open(path, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for record in records:
                    for name, content in self._members(record):
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())

    def _members(self, record: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        key = self.key_of(record["id"])
        for i, (extension, data) in enumerate(record[MEDIA]):
            yield f"{key}.{extension}" if not i else f"{key}.{i}.{extension}", data
        shown = {name: value for name, value in record.items() if name != MEDIA}
        yield f"{key}.txt", str(record.get("text") or "").encode("utf-8", "backslashreplace")
        yield f"{key}.json", json.dumps(shown, ensure_ascii=False).encode("utf-8", "backslashreplace")

    @staticmethod
    def key_of(row_id: object) -> str:
        """A row's name in the archive, in which a dot would end the key."""
        text = f"{row_id:09d}" if isinstance(row_id, int) else os.path.splitext(str(row_id))[0]
        return text.lstrip("/").replace(".", "_") or "_"

    def read(self, path: Path) -> Iterator[Record]:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json") and (content := archive.extractfile(member)) is not None:
                    yield json.loads(content.read())


SINKS: Mapping[str, type[Sink]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "txt": JsonLines,
    "json": JsonLines,
    "openai": JsonLines,
}


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Sidecars:
    """A text or JSON file for each record, at the place that its media have below the job's folder.

    Args:
        folder: Where they are written.
        form: "txt" has the answer alone, "json" the whole record.
    """

    def __init__(self, folder: Path, form: str) -> None:
        self._folder, self._form = folder, form

    def path_of(self, row_id: object, prompt: str = "") -> Path:
        """The file of a row's answer.

        Args:
            prompt: Its name, where there are several.

        Raises:
            JobError: The id leads out of the folder.
        """
        stem, ending = os.path.splitext(str(row_id))
        stem = (stem if ending.lower() in EXTENSIONS else str(row_id)).lstrip("/")
        if ".." in Path(stem).parts:
            raise JobError(f"the id {row_id!r} leads out of the folder of the results")
        return self._folder / f"{stem}{f'.{prompt}' if prompt else ''}.{self._form}"

    def write(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        if self._form == "json":
            text = json.dumps(dict(record), ensure_ascii=False, indent=1)
            write_atomically(self.path_of(record["id"]), f"{text}\n".encode("utf-8", "backslashreplace"))
            return
        for name, text in texts.items():
            path = self.path_of(record["id"], name if len(texts) > 1 else "")
            write_atomically(path, f"{text}\n".encode("utf-8", "backslashreplace"))
