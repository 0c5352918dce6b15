"""Lets clients read an answer that comes before they have sent their whole body, such as 401 or 413.

A connection that is closed while bytes of the client are unread is reset, and the client loses the answer. So the rest
of the body is read and dropped, within bounds, before the response ends.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DROP_S = 10.0
DROP_BYTES = 256 * 1024 * 1024


class DropLeftovers:
    """Sends a response whole, then drops what the client still sends, then ends the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        body = _Body(receive, waits=Headers(scope=scope).get("expect", "").lower() == "100-continue")

        async def send_after_body(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_last and body.is_coming:
                await send({**message, "more_body": True})
                await body.drop()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, body.receive, send_after_body)


class _Body:
    """The body of one request.

    Args:
        waits: The client sends nothing before it is asked to. Asking for the body is the first `receive`.
    """

    def __init__(self, receive: Receive, *, waits: bool) -> None:
        self._receive, self._waits = receive, waits
        self._is_complete = False

    @property
    def is_coming(self) -> bool:
        return not (self._is_complete or self._waits)

    async def receive(self) -> Message:
        self._waits = False
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_complete = True
        return message

    async def drop(self) -> None:
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_S):
                while self.is_coming and num_bytes < DROP_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
