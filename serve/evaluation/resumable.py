"""Answers that survive the end of an evaluation: each goes to a file at once, and the next run asks only the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve.evaluation.client import Backend, EvalRequest, Reply
from serve.evaluation.items import EvaluationError
from serve.lines import cut_unfinished_line

BEGINS = b'{"run": '
"""How each line begins."""


class ResumableBackend:
    """A backend whose replies are kept in a file, one JSON line each.

    A reply is found again by the backend's metadata, the reducer, the question and the medium's bytes. Lines of other
    backends or questions are left alone, and a last line that was cut off is asked again.

    Args:
        backend: Answers what the file does not hold.
        path: The file. It is made with the first reply.
        state: Anything else on which replies depend, such as `files_of` the model's folder.

    Attributes:
        num_found: Replies of this backend that the file held.
    """

    def __init__(self, backend: Backend, path: Path, state: object = None) -> None:
        self._backend, self._path = backend, path
        self._name = _digest(json.dumps([backend.metadata(), state], sort_keys=True).encode())
        self._found = dict(_stored(path, self._name))
        self.num_found = len(self._found)

    def metadata(self) -> dict[str, Any]:
        return self._backend.metadata()

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        """Replies in the order of the requests; those of the file at once."""
        keyed = [(_key(request, reducer), request) for request in requests]
        rest = iter(self._backend.answers([ask for key, ask in keyed if key not in self._found], reducer))
        for key, _ in keyed:
            if (stored := self._found.get(key)) is not None:
                yield stored
                continue
            reply = next(rest)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self._name, "key": key, **asdict(reply)}, ensure_ascii=False) + "\n")
            yield reply

    def close(self) -> None:
        self._backend.close()

    def forget(self) -> None:
        """Delete the file: the evaluation is complete."""
        self._path.unlink(missing_ok=True)


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change (ns) of every file: another list when a model was trained on."""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _stored(path: Path, name: str) -> Iterator[tuple[str, Reply]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        begins = file.read(len(BEGINS))
    if not BEGINS.startswith(begins):
        raise EvaluationError(f"{path} holds something else than answers; move it away")
    cut_unfinished_line(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                stored = json.loads(line)
            except ValueError:
                what = f"line {number} of {path} is damaged; take it out, and its question is asked again"
                raise EvaluationError(what) from None
            if stored.pop("run") == name:
                yield stored.pop("key"), Reply(**stored)


def _key(request: EvalRequest, reducer: str | None) -> str:
    return _digest(f"{reducer}\0{request.question}\0{request.media_type}\0".encode() + request.media)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
