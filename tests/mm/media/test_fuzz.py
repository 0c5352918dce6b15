"""Seeded damage: whatever is done to a file, the answer is pixels or a MediaError, and nothing stays behind."""

from __future__ import annotations

import os
import random
import re
import warnings
from pathlib import Path

import pytest

from demos.bench.clips import boxes
from mm.data.media import FrameSampling
from mm.errors import MediaError
from mm.media import decode_image, decode_video
from tests.helpers.damage import mutated, pictures

LEAK = re.compile(r"0x[0-9a-f]{6,}|/|Traceback|Errno")


def outcome(decode, *args) -> str:
    """'ok' or the error's reason; anything else than these two fails the test."""
    caught: MediaError | None = None
    try:
        decode(*args)
    except MediaError as error:
        caught = error
    assert caught is None or (caught.__cause__ is None and not LEAK.search(str(caught).replace("docs/clips.md", "")))
    return caught.reason if caught else "ok"


@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_pictures(make_budget, count):
    rng = random.Random(11)
    originals = pictures()
    outcomes = set()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for index in range(count):
            outcomes.add(outcome(decode_image, mutated(originals[index % len(originals)], rng), make_budget()))
    assert not seen
    assert {"ok", "undecodable"} <= outcomes


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_clips(make_clip, make_budget, count):
    rng = random.Random(5)
    kinds = [("f.mp4", "libx264"), ("f.webm", "libvpx-vp9"), ("f.avi", "mpeg4"), ("f.mkv", "libx264")]
    kinds += [("f.mkv", "ffv1"), ("f.ts", "mpeg2video"), ("f.flv", "flv"), ("f.wmv", "wmv2")]
    originals = [make_clip(name=name, codec=codec) for name, codec in kinds]
    originals.append(boxes.with_edits(make_clip(name="g.mov"), [(500, 0), (500, boxes.EMPTY), (900, 10240)]))
    outcomes = [
        outcome(decode_video, mutated(originals[k % len(originals)], rng), FrameSampling(num_frames=4), make_budget())
        for k in range(count)
    ]
    assert {"ok", "undecodable"} <= set(outcomes)
    assert len(decode_video(originals[0], FrameSampling(num_frames=4), make_budget()).frames) == 4
    assert len(our_children()) <= 1, "the spare, and nothing else"


def our_children() -> list[str]:
    listed = (Path("/proc/self/task") / task / "children" for task in os.listdir("/proc/self/task"))
    pids = [pid for path in listed for pid in _read(path).decode().split()]
    return [pid for pid in pids if b"mm.media.video_child" in _read(Path("/proc") / pid / "cmdline")]


def _read(path: Path) -> bytes:
    """Empty where the thread or the process has ended meanwhile."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
