"""Exceptions to HTTP responses: the only place that knows which status code belongs to which error.

The messages of our own errors are written for clients. For any other error the client gets a fixed sentence, and the
log has the traceback.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException

from mm.errors import (
    CapacityError,
    DeadlineExceeded,
    InvalidOption,
    InvalidRequest,
    MediaError,
    MmError,
    PluginError,
    ReducerFault,
    RequestError,
    UnknownModel,
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


class Unauthorized(RequestError):
    """The request has no API key, or a wrong one."""

    code = "invalid_api_key"

    def __str__(self) -> str:
        return "this server wants an API key: send the header Authorization: Bearer <key>"


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
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def content(self) -> bytes:
        return to_json(self.body)


STATUS: tuple[tuple[type[MmError], int, str], ...] = (
    (UnknownModel, 404, "NotFoundError"),
    (Unauthorized, 401, "authentication_error"),
    (PayloadTooLarge, 413, "invalid_request_error"),
    (RequestError, 400, "invalid_request_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (Unavailable, 503, "server_error"),
    (CapacityError, 429, "rate_limit_error"),
    (ReducerFault, 500, "server_error"),
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
    if isinstance(error, CapacityError) and status in (429, 503):
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
    return "vision.reducer" if isinstance(error, PluginError) else None


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
