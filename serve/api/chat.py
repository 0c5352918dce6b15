"""Answers chat requests: admission, deadline, media, the runtime, and the response whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mm.data.outputs import Delta, Event, Summary
from mm.data.request import Request
from mm.encode.clip_stream import ClipProgress, OnProgress
from mm.errors import DeadlineExceeded, InvalidRequest
from serve.api.body import BodyReader
from serve.api.errors import ErrorResponse, error_response
from serve.api.formats import CHAT, Form
from serve.api.metrics import Metrics
from serve.api.parse import ChatCall, parse_chat
from serve.api.progress import with_progress
from serve.api.render import ResponseMeta, summary_of, to_json
from serve.api.room import Place, Room
from serve.api.stream import News, Writer, sse
from serve.api.trace import TraceRecorder
from serve.config import ServeConfig
from serve.runtime import MediaHandle, Runtime

T = TypeVar("T")
Handle = Callable[[HttpRequest, Any, contextlib.AsyncExitStack], Awaitable[Response]]
"""Answers a request, given its body and what is closed when it is no longer in flight."""

CLIENT_GONE = 499
"""Never sent, since the client is gone; only for the log."""


class Stream(EventSourceResponse):
    """A streamed response that frees what it holds, also when the client is gone before its first byte."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        held: contextlib.AsyncExitStack,
        *,
        headers: dict[str, str],
        send_timeout: float,
    ) -> None:
        super().__init__(content, headers=headers, sep="\n", send_timeout=send_timeout)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


class Chat:
    """Answers chat requests."""

    def __init__(self, runtime: Runtime, config: ServeConfig, metrics: Metrics, bodies: BodyReader) -> None:
        self._runtime, self._config, self._metrics, self._bodies = runtime, config, metrics, bodies
        self.room = Room(config.max_in_flight, metrics, config.names[0])
        path, num_frames = config.record_trace, config.model.num_frames
        self._trace = None if path is None else TraceRecorder(path, num_frames)

    async def answer(self, http: HttpRequest, form: Form = CHAT) -> Response:
        """The response, whole or streamed. An error is returned as a response too."""
        return await self.respond(http, partial(self._admit, form))

    async def respond(self, http: HttpRequest, handle: Handle) -> Response:
        """The response of `handle`, or its error as a response. The request is in flight once its body is there."""
        request_id = http.state.request_id
        try:
            place: Place | None = getattr(http.state, "place", None)
            if place is None:
                self.room.check()
            body = await self._bodies.read_json(http)
            async with contextlib.AsyncExitStack() as slot:  # a stream takes it over
                slot.enter_context((place or self.room.take()).used())
                return await handle(http, body, slot)
        except ClientDisconnect:
            self._metrics.cancelled.labels(self._config.names[0]).inc()
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return http_response(self._error(error, request_id))

    async def _admit(self, form: Form, http: HttpRequest, content: Any, slot: contextlib.AsyncExitStack) -> Response:
        arrived, request_id = time.perf_counter(), http.state.request_id
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        parse = partial(parse_chat, request_id=request_id, config=self._config, tenant=http.state.tenant)
        calls = form.calls(content, parse)
        call = calls[0]
        if len(calls) > (most := self._config.model.max_num_seqs):
            raise InvalidRequest(f"there are {len(calls)} prompts; the limit of this server is {most}", "prompt")
        meta = ResponseMeta(request_id=request_id, model=call.model, created=int(time.time()))
        headers = {"x-mm-ignored-fields": ", ".join(call.ignored)} if call.ignored else {}
        if call.stream:
            first, rest = await unless_gone(http, self._begin(call, arrived, deadline))
            slot.push_async_callback(rest.aclose)
            chunks = self._body(form.writer(meta, call, content), first, rest, request_id)
            return Stream(chunks, slot.pop_all(), headers=headers, send_timeout=self._config.send_timeout_s)
        answers = await unless_gone(http, self._complete_all(calls, arrived, deadline))
        body = form.whole(meta, call, content, answers)
        return Response(to_json(body), media_type="application/json", headers=headers)

    async def _prepared(
        self, call: ChatCall, deadline: float, on_progress: OnProgress | None = None
    ) -> tuple[Request, MediaHandle]:
        await self._runtime.admit(call.request)
        self._metrics.requested(call.request)
        media = await self.encode(call.request, on_progress)
        # The engine also ends the request by itself, should the cancellation not reach it.
        return replace(call.request, timeout_s=max(0.0, deadline - asyncio.get_running_loop().time())), media

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> MediaHandle:
        """The request's encoded media, counted in the metrics."""
        media = await self._runtime.encode(request, on_progress)
        self._metrics.encoded(media)
        return media

    async def _complete_all(self, calls: Sequence[ChatCall], arrived: float, deadline: float) -> list[list[Event]]:
        """The events of each call. All are under way together; if one fails, the others end."""
        tasks = [asyncio.ensure_future(self._complete(call, arrived, deadline)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await ended(tasks)

    async def _complete(self, call: ChatCall, arrived: float, deadline: float) -> list[Event]:
        async with until(deadline), self._runtime.place(call.request):
            events = await self._runtime.complete(*await self._prepared(call, deadline))
        summary = summary_of(events)
        self._first_token(time.perf_counter() - arrived - summary.timings.decode_s)
        self._finished(call, summary, _reasons(events), arrived)
        return events

    async def _begin(self, call: ChatCall, arrived: float, deadline: float) -> tuple[News, AsyncGenerator[News]]:
        """The first news, awaited before the status is sent, and the rest."""
        events = self._watched(call, arrived, deadline)
        try:
            return await anext(events), events
        except BaseException:
            await events.aclose()
            raise

    async def _watched(self, call: ChatCall, arrived: float, deadline: float) -> AsyncGenerator[News]:
        """How far the media are, then the runtime's events, with deadline and metrics."""
        async with contextlib.AsyncExitStack() as held:
            async with until(deadline):
                await held.enter_async_context(self._runtime.place(call.request))
            async with contextlib.aclosing(self._news(call, arrived, deadline)) as every:
                async for news in every:
                    yield news

    async def _news(self, call: ChatCall, arrived: float, deadline: float) -> AsyncGenerator[News]:
        reasons: list[str] = []
        started = False
        prepared = with_progress(partial(self._prepared, call, deadline))
        async with contextlib.aclosing(prepared):
            while True:
                async with until(deadline):
                    news = await anext(prepared)
                if not isinstance(news, ClipProgress):
                    break
                yield news
        # The runtime keeps the media until the first token, in case they have to be encoded again.
        events = self._runtime.stream(*news)
        del news
        try:
            while True:
                async with until(deadline):
                    batch = await anext(events, None)
                if batch is None:
                    return
                if not started:
                    started = True
                    self._first_token(time.perf_counter() - arrived)
                reasons += _reasons(batch)
                if isinstance(batch[-1], Summary):
                    self._finished(call, batch[-1], reasons, arrived)
                yield batch
        finally:
            await events.aclose()

    async def _body(
        self, writer: Writer, first: News, rest: AsyncGenerator[News], request_id: str
    ) -> AsyncIterator[bytes]:
        try:
            async for frames in sse(writer, first, rest, lambda error: self._error(error, request_id)):
                yield frames
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.cancelled.labels(self._config.names[0]).inc()
            raise

    def _first_token(self, seconds: float) -> None:
        self._metrics.ttft.labels(self._config.names[0]).observe(seconds)

    def _finished(self, call: ChatCall, summary: Summary, reasons: list[str], arrived: float) -> None:
        elapsed = time.perf_counter() - arrived
        self._metrics.finished(summary, reasons, elapsed)
        if self._trace is not None:
            self._trace.add(call.request, summary.usage, time.time() - elapsed)

    def _error(self, error: BaseException, request_id: str) -> ErrorResponse:
        response = error_response(error, request_id)
        self._metrics.failed(response.status, response.code)
        return response


def _reasons(events: list[Event]) -> list[str]:
    return [event.finish_reason for event in events if isinstance(event, Delta) and event.finish_reason]


@contextlib.asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Cancel what runs in the context at `deadline`, a time of the event loop.

    Raises:
        DeadlineExceeded: It was cancelled.
    """
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request took longer than this server allows") from None


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects first.

    Raises:
        ClientDisconnect: The client disconnected first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        tasks = [task, gone]
        del task, gone
        await ended(tasks)


async def ended(tasks: list[Any]) -> None:
    """Cancel tasks, wait for their end, and forget them.

    An error of a task has the frames in its traceback that waited for the task. If they held it, the error would hold
    itself, and so the request with its media, until the garbage collector comes by, which may be minutes later.
    """
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def http_response(error: ErrorResponse) -> Response:
    return Response(error.content, error.status, error.headers, media_type="application/json")
