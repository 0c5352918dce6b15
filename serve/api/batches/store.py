"""Files and batches on disk: a SQLite database, and a file for each upload and each result.

Everything belongs to a tenant, the name of an API key; other tenants do not see it. Answers of a batch are rows of the
database as they come, so a restart goes on after the last one.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.errors import InvalidOption
from serve.api.errors import NotFound
from serve.api.render import JsonObject

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL, fields TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    batch TEXT NOT NULL, number INTEGER NOT NULL, status INTEGER NOT NULL, line TEXT NOT NULL,
    PRIMARY KEY (batch, number)
);
"""
ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
"""Statuses of batches with something to do."""


class NotStored(NotFound):
    """There is no such file or batch for this key."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(kind, name)
        self.kind, self.name = kind, name

    def __str__(self) -> str:
        return f"there is no {self.kind} {self.name[:80]!r} here"


class NotServed(NotFound):
    """This server keeps no files."""

    code = "not_served"

    def __str__(self) -> str:
        return "this server keeps no files and batches; the operator starts it with --batch-dir FOLDER"


class BatchStore:
    """The folder. Safe to use from several threads; one process at a time.

    Raises:
        InvalidOption: It cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "batches.sqlite", check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise InvalidOption("serve", "batch_dir", f"was {str(folder)!r}, which cannot be used: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def path_of(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self.folder / file_id

    def new_path(self) -> tuple[str, Path]:
        """An id for a file, and where its content has to be written before `add_file`."""
        file_id = f"file-{uuid.uuid4().hex}"
        return file_id, self.path_of(file_id)

    def add_file(self, file_id: str, tenant: str, name: str, purpose: str) -> JsonObject:
        """Register a file whose content is in place."""
        size = os.path.getsize(self.path_of(file_id))
        values = (file_id, tenant, name, purpose, size, int(time.time()))
        self._rows("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", *values)
        return self.file(file_id, tenant)

    def file(self, file_id: str, tenant: str) -> JsonObject:
        """A file's object.

        Raises:
            NotStored: There is none of that id.
        """
        found = self._rows("SELECT * FROM files WHERE id = ? AND tenant = ?", file_id, tenant)
        if not found:
            raise NotStored("file", file_id)
        return _file(found[0])

    def files(self, tenant: str, purpose: str | None) -> list[JsonObject]:
        """All files of a tenant, the newest first."""
        rows = self._rows("SELECT * FROM files WHERE tenant = ? ORDER BY created_at DESC, rowid DESC", tenant)
        return [_file(row) for row in rows if purpose in (None, row[3])]

    def delete_file(self, file_id: str, tenant: str) -> None:
        """Delete a file and its content.

        Raises:
            NotStored: There is none of that id.
        """
        self.file(file_id, tenant)
        self._rows("DELETE FROM files WHERE id = ?", file_id)
        self.path_of(file_id).unlink(missing_ok=True)

    def add_batch(self, tenant: str, fields: Mapping[str, Any]) -> JsonObject:
        batch_id = f"batch_{uuid.uuid4().hex}"
        now = int(time.time())
        values = (batch_id, tenant, "validating", now, json.dumps(fields))
        self._rows("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", *values)
        return self.batch(batch_id, tenant)

    def batch(self, batch_id: str, tenant: str | None = None) -> JsonObject:
        """A batch's object.

        Args:
            tenant: None finds that of any tenant.

        Raises:
            NotStored: There is none of that id.
        """
        found = self._rows("SELECT * FROM batches WHERE id = ?", batch_id)
        if not found or tenant not in (None, found[0][1]):
            raise NotStored("batch", batch_id)
        return self._batch(found[0])

    def batches(self, tenant: str) -> list[JsonObject]:
        """All batches of a tenant, the newest first."""
        rows = self._rows("SELECT * FROM batches WHERE tenant = ? ORDER BY created_at DESC, rowid DESC", tenant)
        return [self._batch(row) for row in rows]

    def active(self) -> list[tuple[str, str]]:
        """Id and tenant of the batches with something to do, the oldest first."""
        marks = ", ".join("?" * len(ACTIVE))
        return self._rows(
            f"SELECT id, tenant FROM batches WHERE status IN ({marks}) ORDER BY created_at, rowid", *ACTIVE
        )

    def status(self, batch_id: str) -> str:
        return self._rows("SELECT status FROM batches WHERE id = ?", batch_id)[0][0]

    def update(self, batch_id: str, status: str, *, only_from: tuple[str, ...] = ACTIVE, **fields: Any) -> bool:
        """Change a batch, if its status is one of `only_from`. Returns whether it was."""
        with self._lock:
            row = self._rows("SELECT status, fields FROM batches WHERE id = ?", batch_id)[0]
            if row[0] not in only_from:
                return False
            merged = {**json.loads(row[1]), f"{status}_at": int(time.time()), **fields}
            self._rows("UPDATE batches SET status = ?, fields = ? WHERE id = ?", status, json.dumps(merged), batch_id)
            return True

    def add_answer(self, batch_id: str, number: int, status: int, line: str) -> None:
        self._rows("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", batch_id, number, status, line)

    def answered(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have an answer."""
        return {row[0] for row in self._rows("SELECT number FROM answers WHERE batch = ?", batch_id)}

    def lines(self, batch_id: str, *, is_ok: bool) -> Iterator[str]:
        """The answers of a batch in the order of its requests: those with status 200, or the others."""
        sign = "=" if is_ok else "!="
        for row in self._rows(
            f"SELECT line FROM answers WHERE batch = ? AND status {sign} 200 ORDER BY number", batch_id
        ):
            yield row[0]

    def forget_answers(self, batch_id: str) -> None:
        self._rows("DELETE FROM answers WHERE batch = ?", batch_id)

    def _batch(self, row: Any) -> JsonObject:
        batch_id, _, status, created_at, text = row
        fields = json.loads(text)
        if status in ACTIVE:
            counts = self._rows("SELECT status = 200, COUNT(*) FROM answers WHERE batch = ? GROUP BY 1", batch_id)
            by_status = {bool(ok): count for ok, count in counts}
            fields["completed"], fields["failed"] = by_status.get(True, 0), by_status.get(False, 0)
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": batch_id,
            "object": "batch",
            "endpoint": fields["endpoint"],
            "errors": fields.get("errors"),
            "input_file_id": fields["input_file_id"],
            "completion_window": fields["completion_window"],
            "status": status,
            "output_file_id": fields.get("output_file_id"),
            "error_file_id": fields.get("error_file_id"),
            "created_at": created_at,
            "expires_at": created_at + 24 * 3600,
            **{f"{name}_at": fields.get(f"{name}_at") for name in times},
            "request_counts": {name: fields.get(name, 0) for name in ("total", "completed", "failed")},
            "metadata": fields.get("metadata"),
        }


def _file(row: Any) -> JsonObject:
    file_id, _, name, purpose, size, created_at = row
    shown = {"id": file_id, "object": "file", "bytes": size, "created_at": created_at, "filename": name}
    return shown | {"purpose": purpose, "status": "processed", "expires_at": None, "status_details": None}
