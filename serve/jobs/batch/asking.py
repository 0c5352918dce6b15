"""Asks a server for a job: many requests together, as many as it takes, and again after what passes by itself."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

MAX_TRIES = 8
PASSING = frozenset({408, 429, 502, 503, 504})
"""Statuses after which the same request may succeed."""
MAX_DELAY_S = 30.0
CONNECT_TIMEOUT_S = 10.0


class AskError(Exception):
    """A request failed for good.

    Args:
        stage: "load" where its media cannot be used, else "answer".
        is_fault: It is the server's fault, and other requests would fail too.
        attempts: How often it was sent.
    """

    def __init__(self, stage: str, code: str, message: str, *, is_fault: bool, attempts: int, status: int = 0) -> None:
        super().__init__(stage, code, message)
        self.stage, self.code, self.message, self.status = stage, code, message, status
        self.is_fault, self.attempts = is_fault, attempts


@dataclass(kw_only=True)
class Gate:
    """How many requests may be under way: more after successes, half as many when the server says that it is full.

    Attributes:
        most: Never more than these.
        limit: At present.
    """

    most: int
    limit: float = 4.0
    num_in_flight: int = 0
    paused_until: float = 0.0
    _last_cut: float = 0.0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the places."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.num_in_flight < max(1, int(self.limit)))
            self.num_in_flight += 1
        try:
            if (wait_s := self.paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            yield
        finally:
            async with self._changed:
                self.num_in_flight -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        self.limit = min(self.most, self.limit + 1 / max(1.0, self.limit))

    def was_full(self, retry_after_s: float) -> None:
        now = time.monotonic()
        if now - self._last_cut > 1.0:
            self.limit, self._last_cut = max(1.0, self.limit / 2), now
        self.paused_until = max(self.paused_until, now + retry_after_s)


class Asker:
    """One server, or an application in this process.

    Args:
        client: Reaches it; see `remote_client` and `local_client`.
        gate: How many requests may be under way.
    """

    def __init__(self, client: httpx.AsyncClient, gate: Gate, *, max_tries: int = MAX_TRIES) -> None:
        self._client, self._gate, self._max_tries = client, gate, max_tries

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response's JSON object.

        Raises:
            AskError: It failed for good.
        """
        content = await asyncio.to_thread(lambda: json.dumps(body).encode())
        for attempt in range(1, self._max_tries + 1):
            async with self._gate.place():
                status, answer, retry_after_s = await self._send(path, content)
            if status == 200 and isinstance(answer, dict):
                self._gate.succeeded()
                return answer
            if status not in PASSING and status:
                raise _error(status, answer, attempt)
            if attempt == self._max_tries:
                break
            delay_s = retry_after_s or min(MAX_DELAY_S, 0.25 * 2**attempt) * random.uniform(0.5, 1.0)
            if status in (429, 503):
                self._gate.was_full(retry_after_s)
            await asyncio.sleep(min(MAX_DELAY_S, delay_s))
        raise _error(status, answer, self._max_tries)

    async def _send(self, path: str, content: bytes) -> tuple[int, Any, float]:
        """Status (0 where there is none), JSON or text, and the seconds of `Retry-After`."""
        import httpx

        try:
            response = await self._client.post(path, content=content, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            return 0, f"the server cannot be reached ({type(error).__name__})", 0.0
        try:
            answer = response.json()
        except ValueError:
            answer = response.text[:200]
        after = response.headers.get("retry-after", "")
        return response.status_code, answer, float(after) if after.isdecimal() else 0.0


def _error(status: int, answer: Any, attempts: int) -> AskError:
    found = answer.get("error") if isinstance(answer, dict) else None
    fields = found if isinstance(found, dict) else {}
    message = str(fields.get("message") or (answer if isinstance(answer, str) else f"status {status}"))
    code = str(fields.get("code") or ("unreachable" if not status else f"status_{status}"))
    stage = "load" if code.startswith("media_") else "answer"
    is_fault = not status or status >= 500 or status in (401, 403, 404, 429)
    return AskError(stage, code, message, is_fault=is_fault, attempts=attempts, status=status)


def remote_client(url: str, api_key: str | None, timeout_s: float, most: int) -> httpx.AsyncClient:
    """A client of a server anywhere. Nothing of the environment is used."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    base = url.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(base_url=base, headers=headers, limits=limits, timeout=timeout, trust_env=False)


def local_client(app: FastAPI) -> httpx.AsyncClient:
    """A client of an application in this process, without a socket."""
    import httpx

    return transport_client(httpx.ASGITransport(app=app, raise_app_exceptions=False))


def transport_client(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    """A client of what is reached without a network."""
    import httpx

    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)
