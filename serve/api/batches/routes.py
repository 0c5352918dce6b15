"""The routes of `/v1/files` and `/v1/batches`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.formparsers import MultiPartException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.types import Message

from mm.errors import InvalidRequest, shown
from serve.api.batches.store import BatchStore, NotServed
from serve.api.batches.worker import ENDPOINTS, BatchWorker
from serve.api.body import BodyReader
from serve.api.errors import PayloadTooLarge
from serve.api.render import JsonObject, to_json
from serve.config import ServeConfig

PURPOSES = ("batch",)
MAX_NAME_CHARS = 200
MAX_METADATA = 16
PAGE = 20
MAX_PAGE = 10_000
CANCELLABLE = ("validating", "in_progress")


class BatchRoutes:
    """Answers the routes.

    Args:
        max_file_bytes: Of an upload.
    """

    def __init__(self, store: BatchStore, worker: BatchWorker, bodies: BodyReader, max_file_bytes: int) -> None:
        self._store, self._worker, self._bodies, self._max_file_bytes = store, worker, bodies, max_file_bytes

    async def upload(self, http: HttpRequest) -> Response:
        """Keep an uploaded file."""
        announced = http.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_file_bytes:
            raise PayloadTooLarge(self._max_file_bytes)
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise InvalidRequest("send the file as multipart/form-data, with purpose and file", "file")
        limited = HttpRequest(http.scope, self._limited(http))
        try:
            async with limited.form(max_files=1, max_fields=8) as form:
                purpose, file = form.get("purpose"), form.get("file")
                if purpose not in PURPOSES:
                    raise InvalidRequest(f"purpose was {shown(purpose)}; allowed: {', '.join(PURPOSES)}", "purpose")
                if file is None or isinstance(file, str):
                    raise InvalidRequest("file is missing; send a file", "file", "missing_parameter")
                file_id, path = self._store.new_path()
                await asyncio.to_thread(_copy, file.file, path)
                name = os.path.basename(file.filename or "file")[:MAX_NAME_CHARS]
        except MultiPartException as error:
            raise InvalidRequest(f"the form cannot be read: {error.message}", None) from None
        return _json(self._store.add_file(file_id, http.state.tenant, name, str(purpose)))

    def _limited(self, http: HttpRequest) -> Any:
        """What receives the body, and stops when it is too large."""
        size = 0

        async def receive() -> Message:
            nonlocal size
            message = await http.receive()
            size += len(message.get("body", b""))
            if size > self._max_file_bytes:
                raise PayloadTooLarge(self._max_file_bytes)
            return message

        return receive

    async def files(self, http: HttpRequest) -> Response:
        found = self._store.files(http.state.tenant, http.query_params.get("purpose"))
        return _json(_page(found, http))

    async def file(self, http: HttpRequest, file_id: str) -> Response:
        return _json(self._store.file(file_id, http.state.tenant))

    async def content(self, http: HttpRequest, file_id: str) -> Response:
        file = self._store.file(file_id, http.state.tenant)
        return FileResponse(self._store.path_of(file["id"]), media_type="application/octet-stream")

    async def delete(self, http: HttpRequest, file_id: str) -> Response:
        self._store.delete_file(file_id, http.state.tenant)
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def create(self, http: HttpRequest) -> Response:
        """Begin a batch."""
        body = await self._bodies.read_json(http)
        if not isinstance(body, dict):
            raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
        fields = {name: value for name, value in body.items() if value is not None}
        known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
        if unknown := next((name for name in fields if name not in known), None):
            raise InvalidRequest(f"the field {unknown[:100]!r} is unknown", unknown[:100], "unknown_parameter")
        file_id, endpoint = fields.get("input_file_id"), fields.get("endpoint")
        if not isinstance(file_id, str):
            raise InvalidRequest("input_file_id is missing", "input_file_id", "missing_parameter")
        if endpoint not in ENDPOINTS:
            raise InvalidRequest(f"endpoint was {shown(endpoint)}; allowed: {', '.join(ENDPOINTS)}", "endpoint")
        window = fields.get("completion_window")
        if window != "24h":
            raise InvalidRequest(f"completion_window was {shown(window)}; allowed: 24h", "completion_window")
        self._store.file(file_id, http.state.tenant)
        asked: JsonObject = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
        asked["metadata"] = _metadata(fields.get("metadata"))
        batch = self._store.add_batch(http.state.tenant, asked)
        self._worker.wake()
        return _json(batch)

    async def batches(self, http: HttpRequest) -> Response:
        return _json(_page(self._store.batches(http.state.tenant), http))

    async def batch(self, http: HttpRequest, batch_id: str) -> Response:
        return _json(self._store.batch(batch_id, http.state.tenant))

    async def cancel(self, http: HttpRequest, batch_id: str) -> Response:
        batch = self._store.batch(batch_id, http.state.tenant)
        if not self._store.update(batch_id, "cancelling", only_from=CANCELLABLE) and batch["status"] != "cancelling":
            raise InvalidRequest(f"the batch is {batch['status']} already and cannot be cancelled", "batch_id")
        self._worker.wake()
        return _json(self._store.batch(batch_id, http.state.tenant))


def _copy(source: Any, path: Any) -> None:
    with open(path, "wb") as file:
        while piece := source.read(1 << 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _metadata(value: object) -> JsonObject | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_METADATA or len(json.dumps(value)) > 16_384:
        raise InvalidRequest(f"metadata was {shown(value)}; it has to be an object of up to 16 texts", "metadata")
    if not all(isinstance(item, str) for item in value.values()):
        raise InvalidRequest("metadata has to hold texts", "metadata")
    return value


def _page(found: Sequence[JsonObject], http: HttpRequest) -> JsonObject:
    """A page of a list, by `limit` and `after`."""
    text = http.query_params.get("limit", str(PAGE))
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_PAGE:
        raise InvalidRequest(f"limit was {shown(text)}; it has to be 1 to {MAX_PAGE}", "limit")
    after, items = http.query_params.get("after"), list(found)
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        items = items[places[0] + 1 :] if places else []
    shown_items, has_more = items[: int(text)], len(items) > int(text)
    ends = {"first_id": shown_items[0]["id"], "last_id": shown_items[-1]["id"]} if shown_items else {}
    return {"object": "list", "data": shown_items, "has_more": has_more, "first_id": None, "last_id": None, **ends}


def _json(content: JsonObject) -> Response:
    return Response(to_json(content), media_type="application/json")


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What the routes need: the folder, who works on it, and its bound."""

    store: BatchStore
    worker: BatchWorker
    max_file_bytes: int

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Batches are worked on while the application runs; those of an earlier run go on."""
        async with self.worker:
            yield


def batches_of(config: ServeConfig, build: Callable[[ServeConfig], FastAPI]) -> Batches | None:
    """The batches of a server, if it has a folder for them.

    Args:
        build: Makes the application that answers their requests, over the same runtime.
    """
    if config.batch_dir is None:
        return None
    inner = replace(config, batch_dir=None, api_keys=(), ui=False)
    store = BatchStore(Path(config.batch_dir))
    return Batches(
        store=store, worker=BatchWorker(store, lambda: build(inner)), max_file_bytes=config.max_batch_file_bytes
    )


def add_batches(app: FastAPI, batches: Batches | None, bodies: BodyReader) -> None:
    """Add the routes. Without a folder they say which option gives one."""
    if batches is not None:
        _add_routes(app, BatchRoutes(batches.store, batches.worker, bodies, batches.max_file_bytes))
        return

    async def absent(http: HttpRequest) -> Response:
        raise NotServed

    for path in ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}"):
        app.add_api_route(path, absent, methods=["GET", "POST", "DELETE"], include_in_schema=False)


def _add_routes(app: FastAPI, routes: BatchRoutes) -> None:
    """The routes themselves."""
    upload_schema = {
        "type": "object",
        "required": ["purpose", "file"],
        "properties": {"purpose": {"enum": list(PURPOSES)}, "file": {"type": "string", "format": "binary"}},
    }
    upload = {"content": {"multipart/form-data": {"schema": upload_schema}}, "required": True}
    create_schema = {
        "type": "object",
        "required": ["input_file_id", "endpoint", "completion_window"],
        "properties": {
            "input_file_id": {"type": "string"},
            "endpoint": {"enum": list(ENDPOINTS)},
            "completion_window": {"const": "24h"},
            "metadata": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": MAX_METADATA},
        },
        "additionalProperties": False,
    }
    create = {"content": {"application/json": {"schema": create_schema}}, "required": True}
    plain: dict[str, Any] = {"response_class": Response}
    app.post("/v1/files", openapi_extra={"requestBody": upload}, **plain)(routes.upload)
    app.get("/v1/files", **plain)(routes.files)
    app.get("/v1/files/{file_id}", **plain)(routes.file)
    app.get("/v1/files/{file_id}/content", **plain)(routes.content)
    app.delete("/v1/files/{file_id}", **plain)(routes.delete)
    app.post("/v1/batches", openapi_extra={"requestBody": create}, **plain)(routes.create)
    app.get("/v1/batches", **plain)(routes.batches)
    app.get("/v1/batches/{batch_id}", **plain)(routes.batch)
    app.post("/v1/batches/{batch_id}/cancel", **plain)(routes.cancel)
