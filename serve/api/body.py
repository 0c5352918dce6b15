"""Reads a request's body and fetches its media, without blocking the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest

from mm.config import MediaLimits, SourcePolicy
from mm.data.media import Media, MediaSource
from mm.data.request import Request
from mm.errors import InvalidRequest
from mm.media import MediaBudget, fetch
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


async def with_media(request: Request, limits: MediaLimits, policy: SourcePolicy) -> Request:
    """The request with the bytes of every media source.

    Raises:
        MediaError: A source is not allowed, too large or broken; names the field.
    """
    if not request.media:
        return request
    # Over HTTP nobody may name a path of this machine, whatever the policy allows elsewhere.
    policy = replace(policy, allow_paths=False)
    return replace(request, media=await asyncio.to_thread(_fetched, request.media, limits, policy))


def _fetched(media: tuple[Media, ...], limits: MediaLimits, policy: SourcePolicy) -> tuple[Media, ...]:
    budget = MediaBudget(limits)
    return tuple(
        replace(item, source=fetch(item, policy, budget)) if isinstance(item, MediaSource) else item for item in media
    )
