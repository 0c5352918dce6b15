"""Animated WebP to a plan and frames, with libwebp through Pillow: FFmpeg decodes only still WebP.

The video child imports this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from itertools import accumulate
from typing import BinaryIO

import numpy as np
from PIL import WebPImagePlugin

from mm.media.video_messages import DecodeRequest, Done, Frame, Message, Plan, Refused
from mm.media.video_pixels import on_white

SHORTEST_MS, DEFAULT_MS = 10, 100
"""Browsers show a frame of at most `SHORTEST_MS` for `DEFAULT_MS`."""


def is_animated_webp(file: BinaryIO) -> bool:
    """Whether a file is a WebP whose header announces an animation."""
    file.seek(0)
    data = file.read(21)
    return data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) > 20 and bool(data[20] & 2)


def decode_webp(file: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """The chosen frames, each composed with those before it.

    Raises:
        Refused: A limit of the request, or there is no frame.
    """
    file.seek(0)
    data = file.read()
    durations_s = list(_durations_s(data))
    with WebPImagePlugin.WebPImageFile(BytesIO(data)) as picture:
        if picture.width * picture.height > request.max_pixels:
            raise Refused("too_many_pixels", request.max_pixels)
        if not durations_s:
            raise Refused("empty")
        times_s = [0.0, *accumulate(durations_s[:-1])]
        duration_s = times_s[-1] + durations_s[-1]
        chosen = request.choose(times_s, duration_s)
        yield Plan(*picture.size, len(chosen), duration_s)
        for index in chosen:
            if index >= request.max_decoded_frames:
                raise Refused("too_many_frames", request.max_decoded_frames)
            try:
                picture.seek(index)
                pixels = np.asarray(picture.convert("RGBA"))
            except (OSError, EOFError):  # what follows needs this frame
                yield Done(1)
                return
            yield Frame(times_s[index], on_white(pixels))
    yield Done(0)


def _durations_s(data: bytes) -> Iterator[float]:
    """The duration of each frame. They stand in the chunks `ANMF`, in milliseconds."""
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == b"ANMF":
            milliseconds = int.from_bytes(data[at + 20 : at + 23], "little")
            yield (milliseconds if milliseconds > SHORTEST_MS else DEFAULT_MS) / 1000
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
