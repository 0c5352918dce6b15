"""Hashes of media content, so that caches can look up an item before it is decoded.

Each part is hashed with a tag of its type and with its length. Otherwise a 30x150 and a 150x30 picture, or the parts
("ab", "c") and ("a", "bc"), would have the same hash, which was the fault in CVE-2025-46722.
"""

from __future__ import annotations

import struct

import blake3
import numpy as np

from mm.data.media import FrameSampling, Kind, Pixels

Part = bytes | str | int | float | None


def content_hash(kind: Kind, data: bytes, frames: FrameSampling | None = None) -> str:
    """Hash of an encoded file: 64 hex digits.

    Args:
        frames: For clips, which frames are sampled.
    """
    sampling = (frames.num_frames, frames.fps, frames.max_frames) if frames else (None, None, None)
    return framed_hash("encoded", kind, *sampling, data)


def pixel_hash(kind: Kind, pixels: Pixels, times_s: tuple[float, ...] = ()) -> str:
    """Hash of pixels that were given in memory: 64 hex digits."""
    shape, body = pixels.shape, np.ascontiguousarray(pixels).tobytes()
    return framed_hash("pixels", kind, pixels.dtype.str, len(shape), *shape, len(times_s), *times_s, body)


def framed_hash(*parts: Part) -> str:
    """blake3-256 over the tagged parts with their lengths: 64 hex digits."""
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
