"""Reads a request's body without blocking the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request as HttpRequest

from mm.errors import InvalidRequest
from serve.api.errors import PayloadTooLarge
from serve.api.parse import parse_json

INLINE_BYTES = 64 * 1024
"""Bodies above this are parsed in a thread."""


async def read_json(http: HttpRequest, max_bytes: int) -> Any:
    """The request's body.

    Raises:
        PayloadTooLarge: It is too large; raised as soon as that is known.
        InvalidRequest: It is not JSON.
    """
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise PayloadTooLarge(max_bytes)
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > max_bytes:
            raise PayloadTooLarge(max_bytes)
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object", None, "invalid_json")
    return parse_json(body) if len(body) < INLINE_BYTES else await asyncio.to_thread(parse_json, body)
