"""Small valid files of every kind, and ways to damage them; seeded, so that a failure can be repeated."""

from __future__ import annotations

import random
from io import BytesIO

import numpy as np
import PIL.Image


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


def pictures() -> list[bytes]:
    """One small picture of each format and mode that is taken."""
    colours = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    encoded = []
    picture = PIL.Image.fromarray(colours)
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
