"""Clips chunk by chunk: never whole in memory, told as they go, and prefilled before they have ended."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

import mm
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.encode import pipeline
from mm.encode.clip_stream import STREAMED_FRAMES, ClipProgress
from mm.encode.pipeline import encode, encode_loaded, load
from mm.engine.loop import EngineLoop
from mm.errors import MediaError
from mm.media import MediaBudget, decode_video
from tests.helpers.clips import clip_bytes

NUM_FRAMES = 150


@pytest.fixture(scope="module")
def model() -> mm.Model:
    limits = mm.config.MediaLimits(max_sampled_frames=NUM_FRAMES)
    return mm.load("tiny", dtype="float32", num_threads=1, limits=limits)


@pytest.fixture(scope="module")
def file() -> bytes:
    return clip_bytes(num_frames=NUM_FRAMES, fps=10)


def question(media: object, **options: object) -> Request:
    asked = {"reducer": "cubes:frames_per_cube=24", "num_frames": NUM_FRAMES, "temperature": 0.0} | options
    return mm.api.build_request("What happens?", videos=[media], max_new_tokens=6, ignore_eos=True, **asked)


def progress_of(request: Request, model: mm.Model) -> tuple[EncodedMedia, list[ClipProgress]]:
    told: list[ClipProgress] = []
    return encode_loaded(load(request, model.encode_parts), model.encode_parts, told.append), told


def until_idle(model: mm.Model) -> None:
    end = time.monotonic() + 60
    while model.engine.has_work and time.monotonic() < end:
        time.sleep(0.01)


def test_a_file_gives_what_its_frames_in_memory_give(model, file, monkeypatch):
    whole = decode_video(file, mm.data.media.FrameSampling(num_frames=NUM_FRAMES), MediaBudget(model.config.limits))
    monkeypatch.setattr(pipeline, "decode", None)  # nothing decodes a clip that is taken chunk by chunk
    (one,) = encode(question(file, cache_salt="file"), model.encode_parts).items
    (two,) = encode(question(replace(whole, content_hash="memory")), model.encode_parts).items
    assert one.cubes == two.cubes
    assert len(one.cubes) == 6
    torch.testing.assert_close(one.tokens.embeddings, two.tokens.embeddings)


def test_progress_is_told_chunk_by_chunk_with_what_is_certain(model, file):
    media, told = progress_of(question(file, cache_salt="progress"), model)
    assert [one.num_frames for one in told] == [*range(STREAMED_FRAMES, NUM_FRAMES, STREAMED_FRAMES), NUM_FRAMES]
    assert {one.total_frames for one in told} == {NUM_FRAMES}
    settled = [one.settled for one in told if one.settled is not None]
    assert len(settled) == 2
    assert all(one.reducer == media.reducer for one in settled)
    for one in settled:
        (early,), (item,) = one.items, media.items
        assert early.key == item.key
        assert torch.equal(early.tokens.embeddings, item.tokens.embeddings[: early.tokens.num_tokens])
    assert progress_of(question(file, cache_salt="progress"), model)[1] == []  # the feature cache has it


def test_what_is_told_raises_ends_the_request(model, file):
    def stop(progress: ClipProgress) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        encode_loaded(load(question(file, cache_salt="stop"), model.encode_parts), model.encode_parts, stop)
    assert encode(question(file, cache_salt="stop"), model.encode_parts).num_cache_hits == 0


def test_a_broken_clip_names_its_field(model, file):
    with pytest.raises(MediaError) as error:
        encode(question(file[: len(file) // 3], cache_salt="broken"), model.encode_parts)
    assert error.value.reason == "undecodable"


def test_what_is_certain_is_prefilled_and_found(model, file):
    """The answer is the same, most of its prompt comes from the prefix cache, and nothing is left in the engine."""
    plain = mm.api.collect(model.run(question(file, cache_salt="plain")))
    request = question(file, cache_salt="ahead")
    media, told = progress_of(request, model)
    loop = EngineLoop(model.engine)
    loop.start()
    try:
        accepted = []
        for settled in (one.settled for one in told if one.settled is not None):
            accepted.append(loop.prefill(request, settled))
            until_idle(model)
        answer = mm.api.collect(loop.stream_sync(request, media))
    finally:
        loop._closed.set()
        model.engine.wake.set()
    assert accepted == [True, True]
    assert answer.token_ids == plain.token_ids
    last = [one.settled.items[0].tokens.num_tokens for one in told if one.settled is not None][-1]
    assert answer.usage.num_cached_tokens > last - 32
    assert plain.usage.num_cached_tokens == 0
    assert not model.engine.has_work


def test_nothing_is_prefilled_where_questions_share_no_visual_tokens(model, file):
    request = question(file, cache_salt="in the decoder", reducer="cubes:frames_per_cube=24 + fastv:layer=1")
    media = encode(request, model.encode_parts)
    loop = EngineLoop(model.engine)
    assert not loop.prefill(question(file), encode(question(file), model.encode_parts))  # no thread would compute it
    loop._thread = threading.current_thread()
    assert not loop.prefill(request, media)
    assert not model.engine.has_work
