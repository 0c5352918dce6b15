"""Clips chunk by chunk: the same frames as the whole clip, the next ones while the caller works, and bounded memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mm.data.media import FrameSampling
from mm.errors import InvalidRequest, MediaError
from mm.media import ChildPool, decode_video, open_clip

ODD_CHILD = str(Path(__file__).with_name("odd_child.py"))
CLIP = b"\0\0\0\x08ftyp"


@pytest.mark.parametrize("chunk_frames", [1, 4, 7, 30, 99])
def test_chunks_are_the_whole_clip(make_clip, make_budget, chunk_frames):
    sampling = FrameSampling(num_frames=30)
    whole = decode_video(make_clip(), sampling, make_budget())
    with open_clip(make_clip(), sampling, make_budget(), chunk_frames=chunk_frames) as clip:
        assert (clip.width, clip.height, clip.num_frames, clip.duration_s) == (64, 48, 30, whole.duration_s)
        chunks = list(clip.chunks(chunk_frames))
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole.frames)
    assert sum((chunk.timestamps_s for chunk in chunks), ()) == whole.timestamps_s
    assert [chunk.first for chunk in chunks] == list(range(0, 30, chunk_frames))
    assert clip.num_damaged == 0


def test_only_the_chunks_in_memory_draw_pixels(make_clip, make_budget):
    sampling, two_chunks = FrameSampling(num_frames=30), 64 * 48 * 8
    with open_clip(make_clip(), sampling, make_budget(max_total_pixels=two_chunks), chunk_frames=4) as clip:
        assert sum(len(chunk.frames) for chunk in clip.chunks(4)) == 30
    with (
        pytest.raises(MediaError, match="more pixels"),
        open_clip(make_clip(), sampling, make_budget(max_total_pixels=two_chunks - 1), chunk_frames=4),
    ):
        pass
    with (
        pytest.raises(InvalidRequest, match="chunk_frames"),
        open_clip(make_clip(), sampling, make_budget(), chunk_frames=0),
    ):
        pass


def test_memory_does_not_grow_with_the_length(make_clip, make_budget):
    def peak_kb(num_frames: int) -> int:
        """Highest resident memory of the child."""
        data = make_clip(name="a.mkv", codec="mpeg4", num_frames=num_frames, width=320, height=240)
        sampling = FrameSampling(num_frames=num_frames)
        with open_clip(data, sampling, make_budget(max_sampled_frames=num_frames), chunk_frames=8) as clip:
            status = Path("/proc") / str(clip._child.process.pid) / "status"
            for chunk in clip.chunks(8):
                if chunk.first + 16 < num_frames:  # the child is alive: it has the last frames still to send
                    lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    assert peak_kb(600) < 1.2 * peak_kb(30)


def odd(decoder: str, act: Callable, budget) -> object:
    pool = ChildPool((sys.executable, ODD_CHILD, decoder))
    try:
        with open_clip(CLIP, FrameSampling(num_frames=40), budget, chunk_frames=2, pool=pool) as clip:
            return act(clip)
    finally:
        pool.close()


def test_a_slow_caller_is_not_timed_out(make_budget):
    def slowly(clip) -> list[int]:
        seen = []
        for chunk in clip.chunks(2):
            seen += chunk.frames[:, 0, 0, 0].tolist()
            time.sleep(0.15)
        return seen

    assert odd("large", slowly, make_budget(decode_wall_s=2.0)) == list(range(40))  # the caller alone takes 3 s


@pytest.mark.parametrize(("decoder", "limits"), [("slow", {"decode_wall_s": 0.8}), ("busy", {"decode_cpu_s": 1})])
def test_a_clip_of_many_sampled_frames_may_take_longer(make_budget, decoder, limits):
    def decode(num_frames: int) -> int:
        pool = ChildPool((sys.executable, ODD_CHILD, decoder))
        budget, sampling = make_budget(max_sampled_frames=600, **limits), FrameSampling(num_frames=num_frames)
        try:
            with open_clip(CLIP, sampling, budget, chunk_frames=16, pool=pool) as clip:
                return sum(len(chunk.frames) for chunk in clip.chunks(16))
        finally:
            pool.close()

    assert decode(600) == 15
    with pytest.raises(MediaError, match="more time"):
        decode(128)


def test_a_caller_may_stop_at_any_chunk(make_budget):
    def first(clip) -> int:
        return int(next(clip.chunks(2)).frames[1, 0, 0, 0])

    assert odd("large", first, make_budget()) == 1


def test_a_child_that_stops_sending_is_ended(make_budget):
    pool = ChildPool((sys.executable, ODD_CHILD, "endless"))
    try:
        with open_clip(
            CLIP, FrameSampling(num_frames=2), make_budget(decode_wall_s=1.0), chunk_frames=1, pool=pool
        ) as clip:
            chunks = clip.chunks(1)
            assert next(chunks).first == 0
            with pytest.raises(MediaError, match="more time"):
                next(chunks)
    finally:
        pool.close()
