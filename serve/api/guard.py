"""Middleware around every request: its id, the check of the API key, and an error response in OpenAI's form.

Plain ASGI, so that streamed responses are not buffered.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import ErrorResponse, Unauthorized, error_response

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ping"})
"""Paths that need no key, compared exactly; every other path does, whether it exists or not."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """Gives every request an id, checks its API key, and answers the errors that nothing else caught.

    Args:
        api_keys: Keys that clients may send; none lets every client in.
        echo_request_id: Whether to send `x-request-id` back; Ray Serve's proxy does that itself.
    """

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...] = (), echo_request_id: bool = True) -> None:
        self._app, self._echo = app, echo_request_id
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id}}
        start = time.perf_counter()
        status = 0
        is_head = scope["method"] == "HEAD"
        if is_head:  # routed as GET; the body of the response is dropped
            scope["method"] = "GET"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
                await _send(error_response(Unauthorized()), send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = error_response(error, request_id)
            if status:
                raise  # the response has begun, so the connection can only be closed
            await _send(response, send_with_id)
        finally:
            log.info(
                "request_id=%s method=%s path=%r status=%d seconds=%.3f",
                request_id,
                "HEAD" if is_head else scope["method"],
                scope["path"][:200],
                status,
                time.perf_counter() - start,
            )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time does not reveal which one was close.
        return sum(hmac.compare_digest(offered, key) for key in self._keys) > 0


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def _send(response: ErrorResponse, send: Send) -> None:
    content = response.content
    headers = {"content-type": "application/json", "content-length": str(len(content))} | response.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
