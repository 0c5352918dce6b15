"""Names for media content, so that caches can look an item up before decoding it.

Every part is type-tagged and length-framed: without that, a 30x150 and a 150x30 picture, or ("ab", "c") and ("a",
"bc"), share a name (CVE-2025-46722 is this mistake).
"""

from __future__ import annotations

import struct

import blake3
import numpy as np

from mm.data.media import FrameSampling, Kind

Part = bytes | str | int | float | None


def content_hash(kind: Kind, data: bytes, frames: FrameSampling | None = None, decoder: str | None = None) -> str:
    """Name of encoded bytes, and for clips of what is sampled from them and by which decoder: 64 hex digits."""
    sampling = (frames.num_frames, frames.fps, frames.max_frames) if frames else (None, None, None)
    return framed_hash("encoded", kind, decoder, *sampling, data)


def pixel_hash(kind: Kind, pixels: np.ndarray, times_s: tuple[float, ...] = ()) -> str:
    """Name of pixels that never were encoded bytes: 64 hex digits."""
    shape, body = pixels.shape, np.ascontiguousarray(pixels).tobytes()
    return framed_hash("pixels", kind, pixels.dtype.str, len(shape), *shape, len(times_s), *times_s, body)


def framed_hash(*parts: Part) -> str:
    """blake3-256 over tagged, length-framed parts: different tuples never feed it the same bytes."""
    digest = blake3.blake3()
    for part in parts:
        tag, body = _encode(part)
        digest.update(tag + struct.pack("<Q", len(body)))
        digest.update(body)
    return digest.hexdigest()


def _encode(part: Part) -> tuple[bytes, bytes]:
    if part is None:
        return b"n", b""
    if isinstance(part, bytes):
        return b"b", part
    if isinstance(part, str):
        return b"s", part.encode()
    if isinstance(part, float):
        return b"f", struct.pack("<d", part)
    return b"i", str(part).encode()
