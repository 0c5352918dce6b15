"""Seeded damage: whatever is done to a file, the answer is pixels or a MediaError, and nothing stays behind."""

from __future__ import annotations

import os
import random
import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mm.core.data import FrameSampling
from mm.core.errors import MediaError
from mm.media import decode_image, decode_video

LEAK = re.compile(r"0x[0-9a-f]{6,}|/|Traceback|Errno")
RNG = np.random.default_rng(3)
COLOURS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four of: bytes changed; a stretch removed, doubled or zeroed; the end cut; extremes in the header."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(max(len(damaged), 1)), rng.randint(1, 40)
        match rng.randrange(6):
            case 0:
                for _ in range(rng.randint(1, 20)):
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            case 1:
                del damaged[at : at + length]
            case 2:
                damaged[at:at] = damaged[at : at + length]
            case 3:
                damaged[at : at + length] = bytes(len(damaged[at : at + length]))
            case 4:
                del damaged[max(at, 1) :]
            case 5:
                start = rng.randrange(min(len(damaged), 64))
                damaged[start : start + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)])
        damaged = damaged or bytearray(b"\0")
    return bytes(damaged)


def seeds() -> list[bytes]:
    encoded = []
    picture = PIL.Image.fromarray(COLOURS)
    for mode, file_format in [
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
    ]:
        buffer = BytesIO()
        converted = picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
        converted.save(
            buffer, file_format, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        )
        encoded.append(buffer.getvalue())
    return encoded


def outcome(decode, *args) -> str:
    """'ok' or the error's reason; anything else than these two fails the test."""
    caught: MediaError | None = None
    try:
        decode(*args)
    except MediaError as error:
        caught = error
    assert caught is None or (caught.__cause__ is None and not LEAK.search(str(caught)))
    return caught.reason if caught else "ok"


@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_pictures(make_budget, count):
    rng = random.Random(11)
    originals = seeds()
    outcomes = set()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for index in range(count):
            outcomes.add(outcome(decode_image, mutated(originals[index % len(originals)], rng), make_budget()))
    assert not seen
    assert {"ok", "undecodable"} <= outcomes


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_clips(make_clip, make_budget, count, decoder):
    rng = random.Random(5)
    kinds = (("f.mp4", "libx264"), ("f.webm", "libvpx-vp9"), ("f.avi", "mpeg4"), ("f.mkv", "libx264"))
    originals = [make_clip(name=name, codec=codec) for name, codec in kinds]
    outcomes = [
        outcome(decode_video, mutated(originals[k % 4], rng), FrameSampling(num_frames=4), make_budget(), decoder)
        for k in range(count)
    ]
    assert {"ok", "undecodable"} <= set(outcomes)
    assert len(decode_video(originals[0], FrameSampling(num_frames=4), make_budget(), decoder).frames) == 4
    assert len(our_children()) <= 2, "one spare for each decoder, and nothing else"


def our_children() -> list[str]:
    listed = (Path("/proc/self/task") / task / "children" for task in os.listdir("/proc/self/task"))
    pids = [pid for path in listed for pid in path.read_text().split()]
    return [pid for pid in pids if b"mm.media.video_child" in (Path("/proc") / pid / "cmdline").read_bytes()]
