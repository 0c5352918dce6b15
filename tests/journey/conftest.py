"""A fake engine under the real HTTP layer: scripted text, real threads, real cancellation."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import PIL.Image
import pytest

from mm.config import MediaLimits, SourcePolicy
from mm.data.outputs import Delta, Event, KeptMap, Summary, Timings, Usage
from mm.data.request import Request, TextLimits
from mm.data.tokens import Encoded, EncodedMedia
from mm.encode.clip_stream import ClipProgress
from mm.engine.loop import EngineLoop
from mm.errors import InvalidOption, UnknownPlugin
from mm.media import MediaBudget, fetch_item
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.runtime import LocalRuntime
from serve.stages import EncoderStage
from tests.helpers.scripted import ScriptedEngine


@dataclass
class FakeEngine:
    """Answers every request with `words`, one token each; counts what it opens and closes."""

    words: tuple[str, ...] = ("A ", "red ", "", "circle", "✓.")
    delay_s: float = 0.0
    error: Exception | None = None
    error_after: int | None = None
    encode_error: Exception | None = None
    progress: tuple[int, ...] = ()
    encode_gate: threading.Event | None = None
    num_encoding: int = 0
    requests: list[Request] = field(default_factory=list)
    num_open: int = 0
    num_closed: int = 0
    num_tokens: int = 0
    gate: threading.Event | None = None
    finish_reason: str = "stop"
    limits: MediaLimits = field(default_factory=MediaLimits)

    def load(self, request: Request) -> Request:
        """The request with its files, as the encoder would fetch them."""
        budget = MediaBudget(self.limits)
        return replace(request, media=tuple(fetch_item(item, SourcePolicy(), budget) for item in request.media))

    def encode(self, request: Request, tell: Any = None) -> EncodedMedia:
        self.requests.append(request)
        self.num_encoding += 1
        try:
            for num_frames in self.progress:
                tell(ClipProgress(num_frames=num_frames, total_frames=self.progress[-1]))
                time.sleep(0.05)
            while self.encode_gate is not None and not self.encode_gate.wait(0.01):
                tell(ClipProgress(num_frames=1, total_frames=1000))
        finally:
            self.num_encoding -= 1
        if self.encode_error is not None:
            raise self.encode_error
        if request.vision.reducer == "divprunne":
            raise UnknownPlugin("reducer", "divprunne", ["divprune", "none"])
        if request.vision.keep_ratio is not None and request.vision.reducer == "none":
            raise InvalidOption("none", "keep_ratio", "does not exist: this reducer has no such budget")
        reducer = request.vision.reducer or "none"
        items = [_encoded(item) for item in request.media]
        return EncodedMedia(items=tuple(items), reducer=reducer)  # type: ignore[arg-type]

    def answer(self, request: Request, encoded: Sequence[Encoded], reducer: str) -> Generator[Event]:
        self.requests.append(request)
        self.num_open += 1
        try:
            yield from self._events(request, encoded, reducer)
        finally:
            self.num_closed += 1

    def _events(self, request: Request, encoded: Sequence[Any], reducer: str) -> Generator[Event]:
        if self.error is not None and self.error_after is None:
            raise self.error
        for choice in range(request.sampling.n):
            for i, word in enumerate(self.words):
                if self.gate is not None:
                    self.gate.wait(10)
                time.sleep(self.delay_s)
                if self.error is not None and self.error_after == i:
                    raise self.error
                self.num_tokens += 1
                reason = self.finish_reason if i + 1 == len(self.words) else None
                yield Delta(choice=choice, text=word, token_ids=(i,), finish_reason=reason, num_prompt_tokens=7)
        num_images = len(encoded)
        usage = Usage(
            num_prompt_tokens=7 + 3 * num_images,
            num_completion_tokens=len(self.words) * request.sampling.n,
            num_cached_tokens=4 * num_images,
            num_image_tokens_in=12 * num_images,
            num_image_tokens_prompt=3 * num_images,
            num_image_tokens_kept=2 * num_images,
        )
        kept = tuple(KeptMap(kind="image", grid=(1, 3, 4), kept=(0, 11)) for _ in encoded)
        kept = kept if request.vision.return_map else ()
        yield Summary(usage=usage, timings=Timings(prefill_s=0.25), kept=kept, reducer=reducer)


def _encoded(file: Any) -> Any:
    return SimpleNamespace(cache_hit=False, num_media_bytes=len(file.data), tokens=SimpleNamespace(kind=file.kind))


LIMITS = TextLimits(max_context_tokens=2048, max_chars=100_000_000, num_token_ids=500)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def build(engine: FakeEngine, **options: Any) -> tuple[Any, LocalRuntime]:
    config = ServeConfig(**{"served_model_names": ("tiny", "alias/tiny")} | options)
    loop = EngineLoop(ScriptedEngine(engine.answer))  # type: ignore[arg-type]
    loop.start()
    engine.limits = config.model.limits
    encoder = EncoderStage(engine.load, engine.encode, ("image", "video"))
    runtime = LocalRuntime(encoder, loop, limits=LIMITS, default_reducer="none", num_places=config.max_ongoing_requests)
    return create_app(runtime, config), runtime


@asynccontextmanager
async def client_of(app: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", **options) as client:
        yield client


@pytest.fixture
def make_client(engine: FakeEngine) -> Callable[..., Any]:
    """A client of an app over the fake engine; options are `ServeConfig`'s."""

    @asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
        app, runtime = build(engine, **options)
        async with client_of(app) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client
        runtime.close()

    return make


@pytest.fixture
async def client(make_client: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client() as client:
        yield client


def png(width: int = 32, height: int = 24, colour: str = "red") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def data_url(raw: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


@pytest.fixture
def image_url() -> str:
    return data_url(png())


@pytest.fixture
def ask() -> Callable[..., dict[str, Any]]:
    """A minimal body, with fields added or replaced."""

    def body(content: Any = "What is this?", **fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | fields

    return body


async def settle(condition: Callable[[], bool], timeout_s: float = 3.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return condition()


@pytest.fixture
def until() -> Callable[..., Any]:
    return settle
