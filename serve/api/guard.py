"""Middleware around every request: its id, the checks of host, page and API key, and errors in OpenAI's form.

Plain ASGI, so that streamed responses are not buffered.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import Unauthorized, error_response, send_response
from serve.api.hosts import HostPolicy

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ping"})
"""Paths that need no key, compared exactly; every other path does, whether it exists or not."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """Gives every request an id, decides whether it is answered, and answers the errors that nothing else caught.

    The request's tenant is put into its state: a name for its API key where there are several keys, else empty.

    Args:
        hosts: Which names and web pages may reach the server.
        api_keys: Keys that clients may send; none lets every client in.
        echo_request_id: Whether to send `x-request-id` back; Ray Serve's proxy does that itself.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: HostPolicy, api_keys: tuple[str, ...] = (), echo_request_id: bool = True
    ) -> None:
        self._app, self._hosts, self._echo = app, hosts, echo_request_id
        self._tenants = {key.encode(): _tenant(key) if len(set(api_keys)) > 1 else "" for key in api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        state = {**scope.get("state", {}), "request_id": request_id, "tenant": ""}
        scope = {**scope, "state": state}
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
            self._hosts.check(headers)
            path = scope["path"].removeprefix(scope.get("root_path", ""))  # behind a route prefix it has both
            if self._tenants and path not in OPEN_PATHS:
                state["tenant"] = self._tenant_of(headers)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = error_response(error, request_id)
            if status:
                raise  # the response has begun, so the connection can only be closed
            await send_response(response, send_with_id)
        finally:
            log.info(
                "request_id=%s method=%s path=%r status=%d seconds=%.3f",
                request_id,
                "HEAD" if is_head else scope["method"],
                scope["path"][:200],
                status,
                time.perf_counter() - start,
            )

    def _tenant_of(self, headers: Headers) -> str:
        """The tenant of the request's key.

        Raises:
            Unauthorized: There is no key, or an unknown one.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time does not reveal which one was close.
        found = [tenant for key, tenant in self._tenants.items() if hmac.compare_digest(offered, key)]
        if not found:
            raise Unauthorized
        return found[0]


def _tenant(key: str) -> str:
    """A name for a key that does not reveal it."""
    return hashlib.sha256(b"mm tenant:" + key.encode()).hexdigest()


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
