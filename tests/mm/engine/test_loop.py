"""One pump, one queue: every reader gets the same events, and a request passes through few threads."""

from __future__ import annotations

import asyncio
import functools
import threading

import numpy as np
import pytest

import mm
from mm.data.outputs import Delta, Event, Summary
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.encode.clip_stream import OnProgress
from mm.encode.loaded import LoadedMedia
from mm.encode.pipeline import encode, encode_loaded, load
from mm.engine.loop import EngineLoop
from mm.errors import CapacityError
from serve.runtime import LocalRuntime
from serve.stages import EncoderStage
from tests.helpers.checkpoints import random_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mm.load(random_llava(tmp_path_factory.mktemp("llava")), dtype="float32")


@pytest.fixture
def started(model):
    """A loop with a thread of its own, over the model's engine."""
    loop = EngineLoop(model.engine)
    loop.start()
    yield loop
    loop._closed.set()
    model.engine.wake.set()
    loop._thread.join(10)


def question(text: str = "What?", seed: int = 0, **options: object) -> Request:
    image = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    options = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True} | options
    return mm.api.build_request(text, images=[image], **options)


def token_ids(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Summary)
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


async def streamed(loop: EngineLoop, request: Request, media: object) -> list[Event]:
    return [event async for batch in loop.stream(request, media) for event in batch]


def test_every_reader_gets_the_same_events(model, started):
    request = question()
    media = encode(request, model.encode_parts)
    alone = list(EngineLoop(model.engine).stream_sync(request, media))
    read = [
        list(started.stream_sync(request, media)),
        asyncio.run(streamed(started, request, media)),
        asyncio.run(started.complete(request, media)),
    ]
    assert [token_ids(events) for events in read] == [token_ids(alone)] * 3
    assert len(token_ids(alone)) == 8


def test_an_error_reaches_every_reader(model, started):
    request = question(max_new_tokens=100_000)
    media = encode(request, model.encode_parts)
    with pytest.raises(mm.errors.ContextTooLong):
        list(started.stream_sync(request, media))
    with pytest.raises(mm.errors.ContextTooLong):
        asyncio.run(started.complete(request, media))
    with pytest.raises(mm.errors.ContextTooLong):
        asyncio.run(streamed(started, request, media))


def test_a_request_passes_through_three_threads_beside_the_event_loop(model, started, monkeypatch):
    """`docs/architecture.md` counts them: encode, submit, engine-loop."""
    seen: dict[str, set[threading.Thread]] = {"encode": set(), "submit": set(), "step": set()}

    def noting(what: str, call):
        def noted(*args, **options):
            seen[what].add(threading.current_thread())
            return call(*args, **options)

        return noted

    monkeypatch.setattr(model.engine, "submit", noting("submit", model.engine.submit))
    monkeypatch.setattr(
        model.engine._decoders._runners[""], "forward", noting("step", model.engine._decoders._runners[""].forward)
    )
    load_one = functools.partial(load, parts=model.encode_parts)

    def encode_one(loaded: LoadedMedia, tell: OnProgress) -> EncodedMedia:
        return encode_loaded(loaded, model.encode_parts, tell)

    encoder = EncoderStage(noting("encode", load_one), noting("encode", encode_one), ("image",))
    runtime = LocalRuntime(
        encoder, started, limits=model.engine.family.text_limits, default_reducer="none", num_places=8
    )

    async def ask() -> list[Event]:
        request = question(seed=5)
        media = await runtime.encode(request)
        return await runtime.complete(request, media)

    before = set(threading.enumerate())
    assert token_ids(asyncio.run(ask()))
    assert all(len(threads) == 1 for threads in seen.values())
    used = set().union(*seen.values())
    assert len(used) == 3
    assert threading.main_thread() not in used
    assert {thread.name.rsplit("_")[0] for thread in used} == {"encode", "submit", "engine-loop"}
    assert set(threading.enumerate()) - before <= used
    encoder.close()


def test_draining_completes_what_was_accepted(model):
    loop = EngineLoop(model.engine)
    submitted = loop.submit(question(seed=9), encode(question(seed=9), model.encode_parts))
    loop.step()
    loop.drain()
    try:
        with pytest.raises(CapacityError, match="being stopped"):
            loop.submit(question(), encode(question(), model.encode_parts))
        assert not loop.is_idle
        assert len(token_ids(list(loop.read(submitted)))) == 8
        assert loop.is_idle
    finally:
        model.engine._admission.is_draining = False
