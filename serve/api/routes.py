"""The HTTP application: OpenAI-compatible chat, models, health and metrics over any runtime."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mm.data.outputs import Delta, Event, Summary
from mm.data.request import Request
from mm.errors import CapacityError, DeadlineExceeded, InvalidRequest, MmError, UnknownModel
from serve.api.body import read_json, with_media
from serve.api.errors import Failure, failure_of
from serve.api.guard import Guard
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.render import Head, completion, summary_of, to_json
from serve.api.schema import ChatBody, ChatCall, parse_chat
from serve.api.stream import Framer, frame, sse
from serve.config import ServeConfig
from serve.runtime import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")

CLIENT_GONE = 499
"""Never sent, since nobody listens; only for the log."""


def create_app(runtime: Runtime, config: ServeConfig, *, echo_request_id: bool = True) -> FastAPI:
    """The application. Loads nothing: `runtime` has it all.

    Args:
        echo_request_id: See `Guard`.
    """
    # The interactive pages would load scripts from elsewhere, so only the schema is served.
    app = FastAPI(title="mm", version=_version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, api_keys=config.api_keys, echo_request_id=echo_request_id)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(MmError, _on_error)
    metrics = Metrics(config.names[0])
    app.state.metrics = metrics
    _add_chat(app, Chat(runtime, config, metrics))
    _add_models(app, runtime, config)
    _add_operations(app, runtime, metrics)
    return app


class Stream(EventSourceResponse):
    """A streamed answer that gives back what it holds, even when the client is gone before its first byte."""

    def __init__(self, content: AsyncIterator[bytes], held: contextlib.AsyncExitStack, **options: Any) -> None:
        super().__init__(content, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


class Chat:
    """Answers chat requests."""

    def __init__(self, runtime: Runtime, config: ServeConfig, metrics: Metrics) -> None:
        self._runtime, self._config, self._metrics = runtime, config, metrics
        self._in_flight = 0

    async def answer(self, http: HttpRequest) -> Response:
        """The response, whole or streamed; every error comes back as one too."""
        request_id = http.state.request_id
        try:
            async with self._admitted() as slot:
                return await self._admit(http, request_id, slot)
        except ClientDisconnect:
            self._metrics.cancelled.labels(self._config.names[0]).inc()
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return self._failed(error, request_id)

    async def _admit(self, http: HttpRequest, request_id: str, slot: contextlib.AsyncExitStack) -> Response:
        arrived = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        call = parse_chat(await read_json(http, self._config.max_body_bytes), request_id, self._config)
        head = Head(request_id=request_id, model=call.model, created=int(time.time()))
        headers = {"x-mm-ignored-fields": ", ".join(call.ignored)} if call.ignored else {}
        if call.stream:
            first, rest = await _unless_gone(http, self._begin(call, arrived, deadline))
            slot.push_async_callback(rest.aclose)
            body = self._body(Framer(head=head, call=call), first, rest, request_id)
            return Stream(body, slot.pop_all(), headers=headers, sep="\n", send_timeout=self._config.send_timeout_s)
        events = await _unless_gone(http, self._complete(call, arrived, deadline))
        answer = completion(
            head,
            events,
            return_map=call.request.vision.return_map,
            return_timings=call.return_timings,
            return_accepted=call.return_accepted,
        )
        return Response(to_json(answer), media_type="application/json", headers=headers)

    @contextlib.asynccontextmanager
    async def _admitted(self) -> AsyncIterator[contextlib.AsyncExitStack]:
        """A place among the requests in flight, given back on leaving; a stream takes it along.

        Raises:
            CapacityError: All places are taken.
        """
        if self._in_flight >= self._config.max_in_flight:
            self._metrics.rejections.labels(self._config.names[0]).inc()
            raise CapacityError("the server is busy; try again shortly")
        async with contextlib.AsyncExitStack() as slot:
            self._in_flight += 1
            gauge = self._metrics.in_flight.labels(self._config.names[0])
            gauge.inc()
            slot.callback(self._leave)
            yield slot

    def _leave(self) -> None:
        self._in_flight -= 1
        self._metrics.in_flight.labels(self._config.names[0]).dec()

    async def _prepared(self, call: ChatCall, deadline: float) -> tuple[Request, Any]:
        request = await with_media(call.request, self._config.model.limits, self._config.model.sources)
        self._metrics.requested(request)
        features = await self._runtime.encode(request)
        self._metrics.encoded(features)
        # The engine lets go of it by itself, even where nobody can tell it that the time is over.
        return replace(request, timeout_s=max(0.0, deadline - asyncio.get_running_loop().time())), features

    async def _complete(self, call: ChatCall, arrived: float, deadline: float) -> list[Event]:
        async with _until(deadline):
            events = await self._runtime.complete(*await self._prepared(call, deadline))
        summary = summary_of(events)
        self._first_token(time.perf_counter() - arrived - summary.timings.decode_s)
        self._finished(summary, _reasons(events), arrived)
        return events

    async def _begin(
        self, call: ChatCall, arrived: float, deadline: float
    ) -> tuple[list[Event], AsyncGenerator[list[Event]]]:
        """The first events, awaited before any header goes out, and the rest."""
        events = self._watched(call, arrived, deadline)
        try:
            return await anext(events), events
        except BaseException:
            await events.aclose()
            raise

    async def _watched(self, call: ChatCall, arrived: float, deadline: float) -> AsyncGenerator[list[Event]]:
        """The runtime's events, with clocks and counters around them."""
        reasons: list[str] = []
        started = False
        async with _until(deadline):
            request, features = await self._prepared(call, deadline)
        # The media stay here until the first token, should they have to be encoded once more.
        events = self._runtime.stream(request, features)
        del request, features
        try:
            while True:
                async with _until(deadline):
                    batch = await anext(events, None)
                if batch is None:
                    return
                if not started:
                    started = True
                    self._first_token(time.perf_counter() - arrived)
                reasons += _reasons(batch)
                if isinstance(batch[-1], Summary):
                    self._finished(batch[-1], reasons, arrived)
                yield batch
        finally:
            await events.aclose()

    async def _body(
        self, framer: Framer, first: list[Event], rest: AsyncGenerator[list[Event]], request_id: str
    ) -> AsyncIterator[bytes]:
        try:
            async for frames in sse(framer, first, rest, lambda error: self._failure(error, request_id)):
                yield frames
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.cancelled.labels(self._config.names[0]).inc()
            raise

    def _first_token(self, seconds: float) -> None:
        self._metrics.ttft.labels(self._config.names[0]).observe(seconds)

    def _finished(self, summary: Summary, reasons: list[str], arrived: float) -> None:
        self._metrics.finished(summary, reasons, time.perf_counter() - arrived)

    def _failure(self, error: BaseException, request_id: str) -> Failure:
        failure = failure_of(error, request_id)
        self._metrics.failed(failure.status, failure.code)
        return failure

    def _failed(self, error: BaseException, request_id: str) -> Response:
        return _response(self._failure(error, request_id))


def _reasons(events: list[Event]) -> list[str]:
    return [event.finish_reason for event in events if isinstance(event, Delta) and event.finish_reason]


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request took longer than this server allows") from None


async def _unless_gone(http: HttpRequest, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes away first.

    Raises:
        ClientDisconnect: It did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for job in (task, gone):
            job.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _response(failure: Failure) -> Response:
    return Response(failure.content, failure.status, failure.headers, media_type="application/json")


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    return _response(failure_of(error, http.state.request_id))


async def _on_invalid(http: HttpRequest, error: Exception) -> Response:
    return _response(failure_of(InvalidRequest("the request's address or parameters are malformed")))


def _add_chat(app: FastAPI, chat: Chat) -> None:
    schema = ChatBody.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    body = {"content": {"application/json": {"schema": schema}}, "required": True}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body}, response_class=Response)
    async def chat_completions(http: HttpRequest) -> Response:
        return await chat.answer(http)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_models(app: FastAPI, runtime: Runtime, config: ServeConfig) -> None:
    created = int(time.time())

    async def card(name: str) -> dict[str, Any]:
        info = await runtime.info()
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "mm",
            "root": config.names[0],
            "parent": None,
            "max_model_len": info.max_context_tokens,
            "input_modalities": ["text", *info.kinds],
            "default_reducer": info.default_reducer,
            "default_drafter": config.model.speculation.drafter,
            "drafters": list(config.model.speculation.offered),
        }

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [await card(name) for name in config.names]
        return Response(to_json({"object": "list", "data": cards}), media_type="application/json")

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model not in config.names:
            raise UnknownModel(model, config.names)
        return Response(to_json(await card(model)), media_type="application/json")

    @app.post("/load_model")
    async def load_model(http: HttpRequest) -> Response:
        """What terminal chat clients call first; the model is loaded already."""
        body = await read_json(http, config.max_body_bytes)
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str):
            raise InvalidRequest("model is missing", "model", "missing_parameter")
        if name.removesuffix("@main") not in config.names:
            raise UnknownModel(name, config.names)
        return Response(frame({"status": "ready", "model": name, "cached": True}), media_type="text/event-stream")


def _add_operations(app: FastAPI, runtime: Runtime, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        healthy = await _or_none(runtime.healthy())
        content = to_json({"status": "ok" if healthy else "unavailable"})
        return Response(content, 200 if healthy else 503, media_type="application/json")

    @app.get("/ping")
    async def ping() -> Response:
        return Response(b"{}", media_type="application/json")

    @app.get("/version")
    async def version_() -> Response:
        return Response(to_json({"version": _version()}), media_type="application/json")

    @app.get("/metrics")
    async def metrics_() -> Response:
        return Response(metrics.exposition(await _or_none(runtime.load())), headers={"content-type": CONTENT_TYPE})


async def _or_none(question: Awaitable[T]) -> T | None:
    """An answer that may fail without failing the page it is on."""
    try:
        return await question
    except Exception as error:
        log.warning("the runtime did not answer: error=%s", type(error).__name__)
        return None


def _version() -> str:
    try:
        return version("mm-serving")
    except PackageNotFoundError:
        return "0"
