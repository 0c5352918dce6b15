"""What a job has done so far, on disk, so that a kill at any moment loses and doubles nothing.

    part-00000.parquet ...  shards of records            failures.jsonl  rows without an answer, and why
    manifest.json           which shards count           .pending.jsonl  records that are in no shard yet

A shard is written whole under another name, renamed, and then named in the manifest, which is replaced in one step.
Records go to the pending file first, one write each; what a kill left there goes into the next shard. So every visible
file can be read at every moment, and a row whose record was written is never asked for again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mm
from serve.jobs.batch.rows import Id
from serve.jobs.batch.sinks import MEDIA, Record, Sink, write_atomically
from serve.jobs.job import JobError, check_same
from serve.lines import cut_unfinished_line

MANIFEST, FAILURES, PENDING = "manifest.json", "failures.jsonl", ".pending.jsonl"


def key_of(row_id: object) -> str:
    """An id as text: 1 and "1" differ."""
    return json.dumps(row_id, ensure_ascii=False)


@dataclass(kw_only=True)
class Store:
    """A job's folder, locked and open for writing.

    Attributes:
        folder: Where it is.
        sink: The form of its shards.
        settings: What decides the answers; all records of a folder share it.
        shard_rows: Records of one shard.
        done: Keys of the rows that have a record.
        failed: Key to the failure of a row that has none.
    """

    folder: Path
    sink: Sink
    settings: Mapping[str, Any]
    shard_rows: int = 512
    done: set[str] = field(default_factory=set[str])
    failed: dict[str, Record] = field(default_factory=dict[str, Record])
    _shards: list[Record] = field(default_factory=list[Record])
    _records: list[Record] = field(default_factory=list[Record])
    _fd: int = -1
    _is_dirty: bool = False

    def open(self) -> Iterator[Record]:
        """Read what earlier runs wrote; every record of theirs, once.

        Raises:
            JobError: They were made with other settings, or a file is damaged.
        """
        manifest = self._manifest()
        if manifest:
            check_same(manifest["settings"], self.settings, self.folder)
            self._shards = list(manifest["shards"])
        else:
            self._write_manifest()
        named = {shard["file"] for shard in self._shards}
        for path in self.folder.iterdir():
            is_shard = path.name.startswith("part-") and path.name.endswith(self.sink.suffix)
            if (is_shard and path.name not in named) or path.name.endswith(".new"):
                path.unlink()  # a kill came between its rename and the manifest
        for shard in self._shards:
            yield from self._read_shard(shard)
        self._read_failures()
        cut_unfinished_line(self.folder / PENDING)
        yield from self._read_pending()
        self._fd = os.open(self.folder / PENDING, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def _manifest(self) -> Record:
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_bytes())
            return {"settings": dict(found["settings"]), "shards": [dict(shard) for shard in found["shards"]]}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise JobError(f"{path} is no manifest of a job; give another --out") from error

    def _read_shard(self, shard: Mapping[str, Any]) -> Iterator[Record]:
        path = self.folder / str(shard["file"])
        try:
            for record in self.sink.read(path):
                self.done.add(key_of(record_id(record)))
                yield record
        except Exception as error:
            what = f"{path} is gone or damaged; put it back, or give another --out"
            raise JobError(what) from error

    def _read_failures(self) -> None:
        for line in self._lines(FAILURES):
            if (key := key_of(line["id"])) not in self.done:
                self.failed[key] = line

    def _read_pending(self) -> Iterator[Record]:
        for line in self._lines(PENDING):
            if "failure" in line:
                key = key_of(line["failure"]["id"])
                if key not in self.done:
                    self.failed[key] = line["failure"]
                continue
            record = line["record"]
            key = key_of(record_id(record))
            if key not in self.done:
                self.done.add(key)
                self.failed.pop(key, None)
                self._records.append(record)
                yield record
        self._is_dirty = bool(self._records)

    def _lines(self, name: str) -> Iterator[Record]:
        path = self.folder / name
        if not path.exists():
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    what = f"line {number} of {path} is damaged; take it out, and its row is asked again"
                    raise JobError(what) from None

    def add(self, record: Record) -> None:
        """Keep a record; it is safe from a kill when this returns."""
        key = key_of(record_id(record))
        assert key not in self.done, "a row has one record"
        if not self.sink.needs_media:
            self._append({"record": record})
        self.done.add(key)
        self.failed.pop(key, None)
        self._records.append(record)
        self._is_dirty = True
        if len(self._records) >= self.shard_rows:
            self.commit()

    def fail(self, failure: Record) -> None:
        """Keep a failure; a later one of the same row replaces it."""
        self._append({"failure": failure})
        self.failed[key_of(failure["id"])] = failure
        self._is_dirty = True

    def forget_failures(self) -> dict[str, Record]:
        """Take the failures out, to try their rows again; they stay on disk until the next commit."""
        earlier, self.failed = self.failed, {}
        return earlier

    def _append(self, line: Record) -> None:
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, data) != len(data):
            os.ftruncate(self._fd, size)
            raise OSError(28, "the pending file could not be written", str(self.folder / PENDING))

    def commit(self) -> None:
        """Make a shard of the records that are in none, and write failures and manifest."""
        if self._records:
            name = f"part-{len(self._shards):05d}{self.sink.suffix}"
            temporary = self.folder / f".{name}.new"
            temporary.unlink(missing_ok=True)
            self.sink.write(temporary, self._records)
            os.replace(temporary, self.folder / name)
            self._shards.append({"file": name, "rows": len(self._records)})
            self._records = []
        lines = (json.dumps(failure, ensure_ascii=False) for failure in self.failed.values())
        write_atomically(
            self.folder / FAILURES, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        )
        self._write_manifest()
        os.ftruncate(self._fd, 0)
        self._is_dirty = False

    def _write_manifest(self) -> None:
        content = {"version": mm.__version__, "settings": dict(self.settings), "shards": self._shards}
        content |= {"rows": sum(shard["rows"] for shard in self._shards), "failures": len(self.failed)}
        write_atomically(self.folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def records(self) -> Iterator[Record]:
        """Every record that is in a shard."""
        for shard in self._shards:
            yield from self.sink.read(self.folder / str(shard["file"]))

    def close(self) -> None:
        """Commit what is left, and close."""
        if self._fd >= 0:
            if self._is_dirty:
                self.commit()
            os.close(self._fd)
            self._fd = -1


def record_id(record: Mapping[str, Any]) -> Id:
    """The id of a record: in OpenAI's form `custom_id`."""
    return record["custom_id"] if "custom_id" in record else record["id"]


__all__ = ["FAILURES", "MANIFEST", "MEDIA", "PENDING", "Store", "key_of", "record_id"]
