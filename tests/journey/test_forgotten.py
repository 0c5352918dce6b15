"""What a request held is free when it has been answered, also after an error, and not when garbage is collected."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mm.data.request import Request
from mm.errors import EngineError, MediaError
from tests.journey.test_lifetimes import Caller

PATH = "/v1/chat/completions"


@pytest.fixture
def collector() -> Iterator[None]:
    """No garbage collection during the test, and no log, whose records hold the tracebacks of errors."""
    gc.collect()
    gc.disable()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


NAME = "forgotten"
HEADERS = {"x-request-id": NAME}


def requests_in_memory() -> list[Request]:
    return [one for one in gc.get_objects() if type(one) is Request and one.request_id.startswith(NAME)]


def _broken_media(engine: Any) -> None:
    engine.encode_error = MediaError("damaged", "image", None)


def _broken_engine(engine: Any) -> None:
    engine.error = EngineError("it broke")


def _broken_later(engine: Any) -> None:
    engine.error, engine.error_after = EngineError("it broke"), 2


def _nothing(_: Any) -> None:
    pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (_nothing, "Hello"),
        (_nothing, "x" * 9000),  # longer than the context, in characters
        (_broken_media, "Hello"),
        (_broken_engine, "Hello"),
        (_broken_later, "Hello"),
    ],
    ids=["answered", "too long", "media", "engine", "engine later"],
)
async def test_an_answered_request_is_forgotten(
    make_client, engine, ask, collector, image_url, prepare: Callable[[Any], None], text: str, stream: bool
) -> None:
    prepare(engine)
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": text}]
    async with make_client() as client:
        statuses = set()
        for _ in range(3):
            answer = await client.post(PATH, json=ask(content, stream=stream), headers=HEADERS)
            statuses.add(answer.status_code)
        assert len(statuses) == 1
        await _settle(engine)
        assert requests_in_memory() == []


async def test_prompts_of_which_one_failed_are_forgotten(make_client, engine, collector) -> None:
    _broken_later(engine)
    async with make_client() as client:
        body = {"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 4}
        assert (await client.post("/v1/completions", json=body, headers=HEADERS)).status_code == 500
        await _settle(engine)
        assert requests_in_memory() == []


async def test_a_request_whose_client_left_is_forgotten(make_client, engine, ask, collector, until) -> None:
    engine.delay_s = 0.05
    async with make_client() as client:
        caller = Caller(client.app, ask())
        caller.scope["headers"] = [*caller.scope["headers"], (b"x-request-id", NAME.encode())]
        task = caller.call()
        assert await until(lambda: engine.num_open == 1)
        caller.gone.set()
        await task
        del task, caller
        assert await until(lambda: engine.num_closed == 1)
        await _settle(engine)
        assert requests_in_memory() == []


async def _settle(engine: Any) -> None:
    """Let the threads of the fake engine finish, and forget what it noted: also where its own error was raised."""
    await asyncio.sleep(0.2)
    engine.requests.clear()
    for error in filter(None, (engine.error, engine.encode_error)):
        error.__traceback__ = error.__context__ = None
