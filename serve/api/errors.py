"""Exceptions to answers: the only place that knows which status code belongs to which error.

Messages of ours are written for callers; anything else becomes a fixed sentence, and the log has the rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from mm.errors import (
    CapacityError,
    DeadlineExceeded,
    InvalidOption,
    InvalidRequest,
    MediaError,
    PluginError,
    ReducerFault,
    RequestError,
    UnknownModel,
)
from serve.api.render import to_json
from serve.runtime import Unavailable

log = logging.getLogger(__name__)

INTERNAL = "the server could not answer this request; the operator finds the reason in the log under the request id"
VISION_FIELDS = ("keep_ratio", "reducer", "num_frames", "fps")


class PayloadTooLarge(RequestError):
    """The body is larger than the server takes."""

    code = "payload_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return f"the request body is larger than the limit of {self.limit_bytes} bytes"


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    code = "invalid_api_key"

    def __str__(self) -> str:
        return "this server wants an API key: send the header Authorization: Bearer <key>"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error as callers see it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def content(self) -> bytes:
        return to_json(self.body)


STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    # first match counts
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


def failure_of(error: BaseException, request_id: str = "-") -> Failure:
    """What the caller is told about `error`. What is our fault is logged with its traceback."""
    if isinstance(error, HTTPException):
        return _http(error)
    for kind, status, type_ in STATUS:
        if isinstance(error, kind) and status < 500:
            return _known(error, status, type_)
        if isinstance(error, kind):
            log.warning("request_id=%s status=%d error=%s", request_id, status, type(error).__name__, exc_info=error)
            told = isinstance(error, CapacityError | ReducerFault)
            return _known(error, status, type_) if told else _internal()
    log.error("request_id=%s status=500 error=%s", request_id, type(error).__name__, exc_info=error)
    return _internal()


def _known(error: Any, status: int, type_: str) -> Failure:
    headers = {}
    if isinstance(error, CapacityError) and status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Failure(status=status, type=type_, code=error.code, message=str(error), param=_param(error), headers=headers)


def _param(error: Any) -> str | None:
    if isinstance(error, InvalidRequest | MediaError | UnknownModel):
        return error.param
    if isinstance(error, InvalidOption) and error.option in VISION_FIELDS:
        return f"vision.{error.option}"
    return "vision.reducer" if isinstance(error, PluginError) else None


def _internal() -> Failure:
    return Failure(status=500, type="server_error", code="internal_error", message=INTERNAL)


def _http(error: HTTPException) -> Failure:
    """Starlette's own refusals: unknown path, wrong method."""
    message, code = {
        404: ("there is nothing at this path", "not_found"),
        405: ("this path does not take this method; see the Allow header", "method_not_allowed"),
    }.get(error.status_code, ("the request cannot be served", "invalid_request"))
    type_ = "NotFoundError" if error.status_code == 404 else "invalid_request_error"
    headers = dict(error.headers or {})
    return Failure(status=error.status_code, type=type_, code=code, message=message, headers=headers)
