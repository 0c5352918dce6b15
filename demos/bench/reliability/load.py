"""Clients that keep a server busy, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import httpx
import numpy as np
import PIL.Image

ANSWER_S = 150.0
"""A request without an end after this long hangs."""
PATH = "/v1/chat/completions"
End = Literal["answered", "error", "refused", "broken", "hung"]


@dataclass(kw_only=True)
class Outcome:
    """What became of one request.

    Attributes:
        end: "answered": as it should be. "error": a stream that says that it cannot go on, by a finish reason, an error
            event and `[DONE]`. "refused": 429 or 503 with `Retry-After`. "broken": anything else. "hung": no end.
        began, ended: Times of `time.monotonic`.
        num_refusals: How often the client had to try again before this end.
        detail: Status and text of what was not answered.
    """

    is_stream: bool
    has_picture: bool
    began: float
    ended: float = 0.0
    end: End = "broken"
    num_refusals: int = 0
    detail: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def picture(seed: int, side_px: int = 96) -> str:
    """A picture that no cache has seen, as a data URL."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((side_px, side_px)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(rng: random.Random, *, is_stream: bool, has_picture: bool, num_tokens: int) -> dict:
    content: list[dict] = [{"type": "text", "text": f"What is number {rng.randrange(10**6)}?"}]
    if has_picture:
        content.append({"type": "image_url", "image_url": {"url": picture(rng.randrange(2**32))}})
    request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0}
    return request | {"max_tokens": num_tokens, "ignore_eos": True, "stream": is_stream}


@dataclass
class Load:
    """Clients that each send one request after the other until they are stopped.

    Args:
        retries: Whether a client that is refused waits and tries again, as clients of OpenAI's packages do.
    """

    url: str
    rng: random.Random
    num_clients: int = 16
    num_tokens: tuple[int, int] = (40, 160)
    retries: bool = True
    outcomes: list[Outcome] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Send requests while the context lasts; requests under way come to their end."""
        stop = asyncio.Event()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(ANSWER_S), limits=limits) as client:
            tasks = [asyncio.create_task(self._client(client, stop)) for _ in range(self.num_clients)]
            try:
                yield self
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def _client(self, client: httpx.AsyncClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            outcome = await self.ask(client)
            self.outcomes.append(outcome)
            if outcome.end in ("broken", "refused"):
                await asyncio.sleep(0.5)

    async def ask(self, client: httpx.AsyncClient) -> Outcome:
        """One request and its end."""
        outcome = Outcome(
            is_stream=self.rng.random() < 0.5, has_picture=self.rng.random() < 0.5, began=time.monotonic()
        )
        request = body(
            self.rng,
            is_stream=outcome.is_stream,
            has_picture=outcome.has_picture,
            num_tokens=self.rng.randint(*self.num_tokens),
        )
        deadline = outcome.began + ANSWER_S
        while True:
            await self._send(client, request, outcome)
            if outcome.end != "refused" or not self.retries or time.monotonic() > deadline:
                break
            outcome.num_refusals += 1
            await asyncio.sleep(1.0)
        outcome.ended = time.monotonic()
        return outcome

    async def _send(self, client: httpx.AsyncClient, request: dict, outcome: Outcome) -> None:
        try:
            async with asyncio.timeout(ANSWER_S), client.stream("POST", PATH, json=request) as response:
                content = (await response.aread()).decode()
        except (TimeoutError, httpx.TimeoutException):
            outcome.end, outcome.detail = "hung", "no end"
        except httpx.HTTPError as error:
            outcome.end, outcome.detail = "broken", f"{type(error).__name__}: {error}"
        else:
            outcome.end = classify(response.status_code, dict(response.headers), content, outcome.is_stream)
            outcome.detail = "" if outcome.end == "answered" else f"{response.status_code} {content[-300:]}"


def classify(status: int, headers: dict[str, str], content: str, is_stream: bool) -> End:
    """What a response means."""
    if status in (429, 503) and "retry-after" in headers:
        return "refused"
    if status != 200:
        return "broken"
    if not is_stream:
        return "answered" if json.loads(content)["choices"][0]["finish_reason"] == "length" else "broken"
    events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    if not events or events[-1] != "[DONE]":
        return "broken"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk.get("choices", ())]
    reason = next((reason for reason in reasons if reason), None)
    if reason == "length" and "error" not in chunks[-1]:
        return "answered"
    return "error" if reason == "error" and "error" in chunks[-1] else "broken"
