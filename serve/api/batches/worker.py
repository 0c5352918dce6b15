"""Works on batches, one after the other: checks the file, answers its requests, and writes the results.

Requests go through an application of their own over the same runtime, with a low priority, so that whoever waits for an
answer is served first. A stop leaves a batch as it is; the next start goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm.media.hashing import framed_hash
from serve.api.batches.store import BatchStore
from serve.api.render import JsonObject
from serve.jobs.batch.asking import Asker, AskError, Gate, local_client

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

MAX_ERRORS = 100
"""Errors of a file that are reported."""
PRIORITY = 1000
"""Of the requests of batches; those of clients have 0."""
MAX_TRIES = 1_000_000
"""A server that is full is asked again without end: it is this one."""
WINDOW_S = 24 * 3600
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One request of a batch."""

    number: int
    custom_id: str
    body: JsonObject


class BatchWorker:
    """Works while its context is open.

    Args:
        build: Makes the application that answers.
        concurrency: Requests under way at a time.
    """

    def __init__(self, store: BatchStore, build: Callable[[], FastAPI], *, concurrency: int = 8) -> None:
        self._store, self._build, self._concurrency = store, build, concurrency
        self._is_asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """There is something to do."""
        self._is_asked.set()

    async def __aenter__(self) -> None:
        self._is_asked = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        self.wake()

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        gate = Gate(most=self._concurrency, limit=self._concurrency)
        async with local_client(self._build()) as client:
            asker = Asker(client, gate, max_tries=MAX_TRIES)
            while True:
                await self._is_asked.wait()
                self._is_asked.clear()
                while active := self._store.active():
                    batch_id, tenant = active[0]
                    try:
                        await self._work(batch_id, tenant, asker)
                    except Exception as error:
                        log.error("batch=%s error=%s", batch_id, type(error).__name__, exc_info=error)
                        fault = {"code": "internal_error", "message": "the server could not work on this batch"}
                        self._store.update(batch_id, "failed", errors=_errors([{**fault, "line": None, "param": None}]))

    async def _work(self, batch_id: str, tenant: str, asker: Asker) -> None:
        batch = self._store.batch(batch_id)
        lines, problems = await asyncio.to_thread(self._read, batch)
        if problems:
            self._store.update(batch_id, "failed", errors=_errors(problems))
            return
        self._store.update(batch_id, "in_progress", only_from=("validating",), total=len(lines))
        done = self._store.answered(batch_id)
        rest = iter([line for line in lines if line.number not in done])
        ends_at = batch["created_at"] + WINDOW_S

        async def answer() -> None:
            for line in rest:
                if self._store.status(batch_id) == "cancelling" or time.time() > ends_at:
                    return
                await self._answer(batch_id, batch["endpoint"], line, tenant, asker)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(answer())
        await asyncio.to_thread(self._finish, batch_id, tenant, is_late=time.time() > ends_at)

    def _read(self, batch: JsonObject) -> tuple[list[Line], list[JsonObject]]:
        """The requests of a batch, and what is wrong with its file."""
        lines: list[Line] = []
        problems: list[JsonObject] = []
        seen: set[str] = set()
        try:
            with open(self._store.path_of(batch["input_file_id"]), "rb") as file:
                for number, raw in enumerate(file):
                    if not raw.strip():
                        continue
                    found = _line(raw, number, batch["endpoint"], seen)
                    if isinstance(found, Line):
                        lines.append(found)
                    elif len(problems) < MAX_ERRORS:
                        problems.append(found)
        except OSError:
            what = {"code": "file_not_found", "message": "the input file is gone", "line": None}
            problems.append({**what, "param": "input_file_id"})
        if not lines and not problems:
            problems.append({"code": "empty_file", "message": "the file holds no requests", "line": 1, "param": None})
        return lines, problems

    async def _answer(self, batch_id: str, endpoint: str, line: Line, tenant: str, asker: Asker) -> None:
        body = {**line.body, "stream": False} if endpoint != "/v1/embeddings" else dict(line.body)
        if endpoint != "/v1/embeddings":
            body.setdefault("priority", PRIORITY)
        if tenant:
            body["cache_salt"] = framed_hash("batch", "tenant", tenant, "salt", str(body.get("cache_salt") or ""))
        try:
            answer = await asker.ask(endpoint, body)
            status = 200
        except AskError as error:
            status = error.status or 500
            kind = "invalid_request_error" if status < 500 else "server_error"
            answer = {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": answer}
        shown = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
        }
        text = json.dumps(shown, ensure_ascii=False)
        await asyncio.to_thread(self._store.add_answer, batch_id, line.number, status, text)

    def _finish(self, batch_id: str, tenant: str, *, is_late: bool) -> None:
        """Write the results and end the batch."""
        is_cancelled = self._store.status(batch_id) == "cancelling"
        if not is_cancelled:
            self._store.update(batch_id, "finalizing", only_from=("in_progress", "finalizing"))
        counts = self._store.batch(batch_id)["request_counts"]
        fields: JsonObject = {"completed": counts["completed"], "failed": counts["failed"]}
        for name, is_ok in (("output", True), ("error", False)):
            if file_id := self._write(self._store.lines(batch_id, is_ok=is_ok), f"{batch_id}_{name}.jsonl", tenant):
                fields[f"{name}_file_id"] = file_id
        status = "cancelled" if is_cancelled else "expired" if is_late else "completed"
        # The counts stand apart from the times, one of which is called `failed_at`.
        self._store.update(batch_id, status, **fields)
        self._store.forget_answers(batch_id)

    def _write(self, lines: Iterator[str], name: str, tenant: str) -> str | None:
        """A file of results; None if there are none."""
        first = next(lines, None)
        if first is None:
            return None
        file_id, path = self._store.new_path()
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{first}\n")
            file.writelines(f"{line}\n" for line in lines)
        self._store.add_file(file_id, tenant, name, "batch_output")
        return file_id


def _line(raw: bytes, number: int, endpoint: str, seen: set[str]) -> Line | JsonObject:
    """A line's request, or what is wrong with it."""

    def wrong(code: str, message: str, param: str | None = None) -> JsonObject:
        return {"code": code, "message": message, "line": number + 1, "param": param}

    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return wrong("invalid_json_line", "the line is no JSON object")
    if not isinstance(found, dict):
        return wrong("invalid_json_line", "the line is no JSON object")
    custom_id, body = found.get("custom_id"), found.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return wrong("missing_required_parameter", "custom_id has to be a text", "custom_id")
    if custom_id in seen:
        return wrong("duplicate_custom_id", f"the custom_id {custom_id[:80]!r} is that of an earlier line", "custom_id")
    seen.add(custom_id)
    if found.get("method") != "POST":
        return wrong("invalid_method", "method has to be POST", "method")
    if found.get("url") != endpoint:
        return wrong("mismatched_endpoint", f"url has to be {endpoint}, as the batch has it", "url")
    if not isinstance(body, dict):
        return wrong("missing_required_parameter", "body has to be an object", "body")
    return Line(number=number, custom_id=custom_id, body=body)


def _errors(problems: list[JsonObject]) -> JsonObject:
    return {"object": "list", "data": problems}
