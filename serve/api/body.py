"""Reads the bodies of requests within limits of time, speed, number and memory. It takes no place in the queue.

A body that has arrived is parsed in a thread if it is large, so that the event loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from mm.errors import CapacityError, InvalidRequest
from serve.api.errors import BodyTooSlow, PayloadTooLarge
from serve.api.json_text import parse_json
from serve.api.memory import trim
from serve.config import ServeConfig

INLINE_BYTES = 64 * 1024
"""Bodies above this are parsed in a thread."""
TRIM_BYTES = 4 * 1024 * 1024
"""After bodies from this size on, memory is given back to the system."""
TRIM_AFTER_S = 0.5
SPEED_GRACE_S = 10.0
"""A body may be slower than the limit for its first seconds."""
EVICTION_GRACE_S = 1.0
"""A body is not given up for others of its address in its first second, in which a quick client has sent it."""
EVICTED_WAIT_S = 10.0
"""Before a body that was given up is answered. Its client would open the next connection at once, which costs more."""


@dataclass(eq=False, kw_only=True)
class _Arriving:
    """A body that is arriving.

    Attributes:
        address: The client's.
        began: Time of the event loop at which reading began.
        timeout: Ends the reading; None before it began.
    """

    address: str
    began: float
    num_bytes: int = 0
    timeout: asyncio.Timeout | None = None
    is_evicted: bool = False


class BodyReader:
    """Reads the bodies of all requests of one application."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._arriving: dict[str, set[_Arriving]] = {}
        self._num_bytes = 0
        self._trimming: asyncio.TimerHandle | None = None

    @property
    def num_arriving(self) -> int:
        """Bodies that are being read."""
        return sum(map(len, self._arriving.values()))

    async def read_json(self, http: HttpRequest) -> Any:
        """The request's body.

        Raises:
            PayloadTooLarge: It is too large; raised as soon as that is known.
            BodyTooSlow: It took too long, or came too slowly.
            CapacityError: Too many bodies are arriving, in all or from this address.
            InvalidRequest: It is not JSON.
        """
        body = await self._read(http)
        if not body:
            raise InvalidRequest("the body is empty; send a JSON object", None, "invalid_json")
        if len(body) >= TRIM_BYTES:
            self._trim_soon()
        return parse_json(body) if len(body) < INLINE_BYTES else await asyncio.to_thread(parse_json, body)

    def _trim_soon(self) -> None:
        """Give memory back when the large body that came now has been dealt with."""
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        asyncio.get_running_loop().run_in_executor(None, trim)

    async def _read(self, http: HttpRequest) -> bytearray:
        limit = self._config.max_body_bytes
        announced = http.headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise PayloadTooLarge(limit)
        address = http.client.host if http.client else ""
        body = bytearray()
        with self._counted(address) as arriving:
            try:
                async with asyncio.timeout_at(self._deadline(arriving)) as arriving.timeout:
                    async for piece in http.stream():
                        body += piece
                        if len(body) > limit:
                            raise PayloadTooLarge(limit)
                        self._count(arriving, len(piece))
                return body
            except TimeoutError:
                body.clear()
        if arriving.is_evicted:
            await asyncio.sleep(EVICTED_WAIT_S)
        raise self._too_slow(arriving)

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[_Arriving]:
        """Count a body as arriving while the context is open. The slowest of its address may have to give way."""
        now = asyncio.get_running_loop().time()
        others = self._arriving.setdefault(address, set())
        if len(others) >= self._config.max_arriving_per_address:
            _evict_slowest(others, now)
        arriving = _Arriving(address=address, began=now)
        others.add(arriving)
        try:
            yield arriving
        finally:
            self._num_bytes -= arriving.num_bytes
            others.discard(arriving)
            if not others:
                self._arriving.pop(address, None)

    def _count(self, arriving: _Arriving, num_bytes: int) -> None:
        arriving.num_bytes += num_bytes
        self._num_bytes += num_bytes
        if self._num_bytes > max(self._config.max_arriving_bytes, self._config.max_body_bytes):
            raise CapacityError("too many large requests are arriving; try again shortly")
        if arriving.timeout is not None and not (arriving.is_evicted or arriving.timeout.expired()):
            arriving.timeout.reschedule(self._deadline(arriving))

    def _deadline(self, arriving: _Arriving) -> float:
        """When the next bytes have to be there, as a time of the event loop."""
        by_speed = SPEED_GRACE_S + arriving.num_bytes / self._config.min_body_bytes_per_s
        return arriving.began + min(by_speed, self._config.body_timeout_s)

    def _too_slow(self, arriving: _Arriving) -> CapacityError | BodyTooSlow:
        if arriving.is_evicted:
            limit = self._config.max_arriving_per_address
            return CapacityError(
                f"your address is sending more than {limit} requests at a time; this was the slowest of them"
            )
        return BodyTooSlow(self._config.body_timeout_s, self._config.min_body_bytes_per_s)


def _evict_slowest(bodies: set[_Arriving], now: float) -> None:
    """End the reading of the slowest body that had time to arrive."""
    reading = [one for one in bodies if one.timeout is not None and not (one.is_evicted or one.timeout.expired())]
    old = [one for one in reading if now - one.began > EVICTION_GRACE_S]
    if not old:
        return
    slowest = min(old, key=lambda one: one.num_bytes / (now - one.began))
    slowest.is_evicted = True
    assert slowest.timeout is not None
    slowest.timeout.reschedule(now)
