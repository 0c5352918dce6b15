"""The output folder: one line of JSON per item, written so that a kill at any moment loses and doubles nothing.

    captions.jsonl   items with a caption      failures.jsonl   items without one, and why
    job.json         the settings all lines share               .lock   held while a job writes

A line is one write, followed by fsync, before the next item is begun; an unfinished last line is cut off when the
folder is opened again. An item has one line in the two files together. Lines are only taken out (a retry, a file that
changed) by replacing the whole file in one step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mm
from serve.jobs.job import JobError, check_same

CAPTIONS, FAILURES, JOB = "captions.jsonl", "failures.jsonl", "job.json"


class Version(NamedTuple):
    """A file's state, cheap to compare. None where the file could not be looked at."""

    size_bytes: int | None
    mtime_ns: int | None

    @classmethod
    def of(cls, path: str) -> Version:
        try:
            status = os.stat(path)
        except OSError:
            return cls(None, None)
        return cls(status.st_size, status.st_mtime_ns)


class Entry(NamedTuple):
    """Where a record stands in its file, and the version of the item it is about."""

    offset: int
    num_bytes: int
    version: Version


class Journal:
    """One file of records, appended to. Keeps their offsets in memory, not their text.

    Attributes:
        entries: By item path, in file order.
        hash_to_path: One item for each content hash that records name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new")
        self._temporary.unlink(missing_ok=True)
        self._open()

    def _open(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.hash_to_path: dict[str, str] = {}
        self._end = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _index(self) -> None:
        torn = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if torn is not None:
                    raise self._damaged(torn)
                record = _parse(line)
                if record is None:
                    torn = number
                elif not _is_record(record) or record["path"] in self.entries:
                    raise self._damaged(number)
                else:
                    self._note(record, len(line))
        if torn is not None:
            self._cut(self._end)

    def _damaged(self, number: int) -> JobError:
        return JobError(
            f"line {number} of {self.path} is not a record of a caption job, or its item has an earlier line; "
            "remove the line, give another --out, or --restart to discard the earlier results"
        )

    def _note(self, record: Mapping[str, Any], num_bytes: int) -> None:
        version = Version(record["size_bytes"], record["mtime_ns"])
        self.entries[record["path"]] = Entry(self._end, num_bytes, version)
        if "content_hash" in record:
            self.hash_to_path.setdefault(record["content_hash"], record["path"])
        self._end += num_bytes

    def _cut(self, num_bytes: int) -> None:
        os.ftruncate(self._fd, num_bytes)
        os.fsync(self._fd)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it survives a power cut once this returns.

        Raises:
            OSError: It could not be written; the file is as before.
        """
        line = _line(record)
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):  # the next run cuts an unfinished line too
                self._cut(self._end)
            raise
        self._note(record, len(line))

    def read(self, path: str) -> dict[str, Any]:
        """The record of an item."""
        entry = self.entries[path]
        return json.loads(os.pread(self._fd, entry.num_bytes, entry.offset))

    def drop(self, paths: Collection[str]) -> None:
        """Take records out; a kill leaves the file as it was or as it shall be."""
        if not paths:
            return
        with open(self._temporary, "wb") as file:
            for path, entry in self.entries.items():
                if path not in paths:
                    file.write(os.pread(self._fd, entry.num_bytes, entry.offset))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)
        self.close()
        self._open()


class OutputFolder:
    """A job's results, open for writing; `open_output` makes one.

    Attributes:
        captions, failures: The records. No item is in both.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = settings
        with contextlib.ExitStack() as stack:
            self.captions = _opened(folder / CAPTIONS, stack)
            self.failures = _opened(folder / FAILURES, stack)
            self._check()
            self._stack = stack.pop_all()

    def _check(self) -> None:
        if both := self.captions.entries.keys() & self.failures.entries.keys():
            raise JobError(
                f"{min(both)} is in both {CAPTIONS} and {FAILURES} of {self.folder}; remove one of the lines"
            )
        if self.captions.entries or self.failures.entries:
            check_same(read_settings(self.folder), self._settings, self.folder)

    def begin(self, inputs: Collection[str], drop: Collection[str]) -> None:
        """Write down the settings and take out the records of the items in `drop`, which will be done again."""
        _write_json(self.folder / JOB, {"version": mm.__version__, "settings": self._settings, "inputs": list(inputs)})
        self.captions.drop(self.captions.entries.keys() & set(drop))
        self.failures.drop(self.failures.entries.keys() & set(drop))

    def close(self) -> None:
        self._stack.close()


def _opened(path: Path, stack: contextlib.ExitStack) -> Journal:
    journal = Journal(path)
    stack.callback(journal.close)
    return journal


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made when missing, against other jobs. The lock ends with the process, however that ends.

    Raises:
        JobError: Another job holds it, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JobError(f"another caption job is writing to {folder}; wait for it, or give another --out") from None
    except OSError as error:
        raise JobError(
            f"the file system of {folder} cannot lock files ({error.strerror}); give another --out"
        ) from None


@contextlib.contextmanager
def open_output(folder: Path, settings: Mapping[str, Any]) -> Iterator[OutputFolder]:
    """The results in a locked folder.

    Raises:
        JobError: They were made with other settings, are damaged, or are not results of a caption job.
    """
    with contextlib.closing(OutputFolder(folder, settings)) as output:
        yield output


def discard(folder: Path) -> None:
    """Delete the results in a locked folder.

    Raises:
        JobError: They are not results of a caption job.
    """
    files = [folder / name for name in (CAPTIONS, FAILURES)]
    if any(file.exists() and file.stat().st_size for file in files):
        read_settings(folder)
    for file in files:
        file.unlink(missing_ok=True)
    _sync_folder(folder)


def read_settings(folder: Path) -> Mapping[str, Any]:
    """The settings that the folder's results were made with.

    Raises:
        JobError: The folder does not say.
    """
    try:
        settings = json.loads((folder / JOB).read_text())["settings"]
    except (OSError, ValueError, TypeError, KeyError):
        settings = None
    if not isinstance(settings, dict):
        raise JobError(
            f"{folder} holds result files, but no {JOB} with the settings that made them; give another --out"
        )
    return settings


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make names in a folder as durable as the files they belong to."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: Python carries its bytes as lone surrogates
        text = json.dumps(record).encode()
    return text + b"\n"


def _parse(line: bytes) -> Any:
    """A whole line's value; None for one that was not written to its end. Only the end of a line is ever missing."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and {"path", "size_bytes", "mtime_ns"} <= value.keys()
