"""Exceptions to HTTP responses: the only place that knows which status code belongs to which error.

The messages of our own errors are written for clients. For any other error the client gets a fixed sentence, and the
log has the traceback.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import Send

from mm.errors import (
    CapacityError,
    DeadlineExceeded,
    DrafterFault,
    DrafterOff,
    InvalidOption,
    InvalidRequest,
    MediaError,
    MmError,
    PluginError,
    PluginFault,
    ReducerFault,
    ReducerOff,
    RequestError,
    SchemaNotFulfilled,
    UnknownModel,
    shown,
)
from serve.api.render import JsonObject, to_json
from serve.runtime import Unavailable

log = logging.getLogger(__name__)

INTERNAL = "the server could not answer this request; the operator finds the reason in the log under the request id"
VISION_FIELDS = ("keep_ratio", "reducer", "num_frames", "fps")


class PayloadTooLarge(RequestError):
    """The body is larger than the server accepts."""

    code = "payload_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return f"the request body is larger than the limit of {self.limit_bytes} bytes"


class BodyTooSlow(RequestError):
    """The body took too long to arrive."""

    code = "request_timeout"

    def __init__(self, timeout_s: float, min_bytes_per_s: float) -> None:
        super().__init__(timeout_s, min_bytes_per_s)
        self.timeout_s, self.min_bytes_per_s = timeout_s, min_bytes_per_s

    def __str__(self) -> str:
        return (
            f"the request body arrived too slowly; it may take {self.timeout_s:g} seconds, and has to come with at "
            f"least {self.min_bytes_per_s:g} bytes per second"
        )


class HostNotAllowed(RequestError):
    """The request names a host that this server does not answer for."""

    code = "host_not_allowed"

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        return (
            f"this server does not answer for the host {shown(self.host)}; use its address, or start it with "
            "--allow-host NAME"
        )


class OriginNotAllowed(RequestError):
    """A web page asks that may not use this server."""

    code = "origin_not_allowed"

    def __init__(self, origin: str) -> None:
        super().__init__(origin)
        self.origin = origin

    def __str__(self) -> str:
        return (
            f"web pages from {shown(self.origin)} may not use this server; to allow them, start it with --allow-origin "
            "and the page's origin, such as https://example.org"
        )


class NotFound(RequestError):
    """There is nothing of that name."""

    code = "not_found"


class Unauthorized(RequestError):
    """The request has no API key, or a wrong one."""

    code = "invalid_api_key"

    def __str__(self) -> str:
        return "this server wants an API key: send the header Authorization: Bearer <key>"


MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 200


def shortened(text: str, limit: int) -> str:
    """A text for a client, without what is beyond a limit: much of it may be the client's own."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True, kw_only=True)
class ErrorResponse:
    """An error as the client sees it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> JsonObject:
        message, param = shortened(self.message, MAX_MESSAGE_CHARS), self.param
        param = None if param is None else shortened(param, MAX_PARAM_CHARS)
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}

    @property
    def content(self) -> bytes:
        return to_json(self.body)


STATUS: tuple[tuple[type[MmError], int, str], ...] = (
    (UnknownModel, 404, "NotFoundError"),
    (NotFound, 404, "NotFoundError"),
    (Unauthorized, 401, "authentication_error"),
    (HostNotAllowed, 403, "permission_error"),
    (OriginNotAllowed, 403, "permission_error"),
    (BodyTooSlow, 408, "timeout_error"),
    (PayloadTooLarge, 413, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (Unavailable, 503, "server_error"),
    (CapacityError, 429, "rate_limit_error"),
    (ReducerOff, 503, "server_error"),
    (DrafterOff, 503, "server_error"),
    (ReducerFault, 500, "server_error"),
    (PluginFault, 503, "server_error"),
    (SchemaNotFulfilled, 500, "server_error"),
    (PluginError, 400, "invalid_request_error"),
)
"""Status and type by error; the first class that fits counts."""


def error_response(error: BaseException, request_id: str = "-") -> ErrorResponse:
    """The response to `error`. Errors of the server are logged with their traceback."""
    if isinstance(error, HTTPException):
        return _http(error)
    if isinstance(error, MmError):
        for kind, status, type_ in STATUS:
            if isinstance(error, kind):
                if status >= 500:
                    name = type(error).__name__
                    log.warning("request_id=%s status=%d error=%s", request_id, status, name, exc_info=error)
                return _known(error, status, type_)
    log.error("request_id=%s status=500 error=%s", request_id, type(error).__name__, exc_info=error)
    return _internal()


def _known(error: MmError, status: int, type_: str) -> ErrorResponse:
    headers = {}
    if isinstance(error, CapacityError | ReducerOff | DrafterOff) and status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorResponse(
        status=status, type=type_, code=error.code, message=str(error), param=_param(error), headers=headers
    )


def _param(error: MmError) -> str | None:
    if isinstance(error, InvalidRequest | MediaError | UnknownModel):
        return error.param
    if isinstance(error, InvalidOption) and error.option in VISION_FIELDS:
        return f"vision.{error.option}"
    if isinstance(error, DrafterFault):
        return "speculation.drafter"
    return "vision.reducer" if isinstance(error, PluginError) and not isinstance(error, PluginFault) else None


def _internal() -> ErrorResponse:
    return ErrorResponse(status=500, type="server_error", code="internal_error", message=INTERNAL)


def _http(error: HTTPException) -> ErrorResponse:
    """The response to an error of Starlette's own: an unknown path, or a wrong method."""
    message, code = {
        404: ("there is nothing at this path", "not_found"),
        405: ("this path does not take this method; see the Allow header", "method_not_allowed"),
    }.get(error.status_code, ("the request cannot be served", "invalid_request"))
    type_ = "NotFoundError" if error.status_code == 404 else "invalid_request_error"
    headers = dict(error.headers or {})
    return ErrorResponse(status=error.status_code, type=type_, code=code, message=message, headers=headers)


async def send_response(response: ErrorResponse, send: Send) -> None:
    """Send an error from plain ASGI."""
    content = response.content
    headers = {"content-type": "application/json", "content-length": str(len(content))} | response.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
