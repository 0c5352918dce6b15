"""Small clips made on the spot, so that no binary files are kept."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

av.logging.set_level(None)


def picture(index: int, width: int, height: int) -> np.ndarray:
    """A flat frame whose brightness tells its index, with a white top-left quarter that tells which way is up."""
    pixels = np.full((height, width, 3), 10 + 2 * (index % 100), np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return pixels


def shade(frame: np.ndarray) -> int:
    """The index `picture` was given, read from the bottom-right quarter."""
    height, width, _ = frame.shape
    return round((float(frame[height * 5 // 8 :, width * 5 // 8 :].mean()) - 10) / 2)


@cache
def clip_bytes(
    name: str = "clip.mp4",
    codec: str = "libx264",
    num_frames: int = 30,
    width: int = 64,
    height: int = 48,
    fps: int = 10,
    pix_fmt: str = "yuv420p",
    times_ms: tuple[int, ...] | None = None,
    options: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """An encoded clip whose frame k shows `picture(k)`, at k / fps or at `times_ms[k]`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with av.open(str(path), "w", options={"movflags": "faststart"} if name.endswith("mp4") else {}) as container:
            stream = container.add_stream(codec, rate=fps, options=dict(options))
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if times_ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            for index in range(num_frames):
                frame = av.VideoFrame.from_ndarray(picture(index, width, height), format="rgb24")
                if times_ms:
                    frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()
