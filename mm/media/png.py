"""PNG files cut down to what decides their pixels, and what Pillow does not do with these.

Chunks that are not needed are dropped before Pillow reads the file, so damage in them has no effect. As libpng does, a
needed ancillary chunk is dropped if its checksum, place or length is wrong, and a critical one makes the file unusable.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL.PngImagePlugin import PngImageFile

from mm.errors import MediaError
from mm.media.orientation import from_raw_profile, orientation_of
from mm.media.rgb import Box

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3
LEVELS = {1: 255, 2: 85, 4: 17, 8: 1, 16: 1}
"""Bit depth to the factor with which Pillow widens a grey sample."""

MAX_TEXT_BYTES = 4 << 20
"""Longest text that is searched for an orientation."""

XMP_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type xmp")
EXIF_KEYWORDS = (b"Raw profile type exif", b"Raw profile type APP1")


@dataclass(frozen=True, kw_only=True)
class Png:
    """A PNG file that Pillow can read.

    Attributes:
        data: The file without the chunks that are not needed.
        depth: Bits per sample.
        transparent: The transparent colour: a grey as Pillow widens it, or three samples. Empty if there is none.
        orientation: 1 to 8.
    """

    data: bytes
    depth: int
    transparent: tuple[int, ...]
    orientation: int


def read_png(data: bytes) -> Png:
    """Cut down a file that begins with `SIGNATURE`.

    Raises:
        MediaError: `undecodable`: it has no header, or a critical chunk has a wrong checksum.
    """
    kept: list[bytes | memoryview] = [SIGNATURE]
    texts: dict[bytes, bytes] = {}
    depth = colour = num_colours = 0
    transparency = exif = b""
    has_pixels = False
    for name, chunk in _chunks(data):
        body = chunk[8:-4]
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not name[0] & 0x20:
            if not is_sound:
                raise MediaError("undecodable")
            kept.append(chunk)
            has_pixels |= name == b"IDAT"
            if name == b"IHDR" and len(body) == 13:
                depth, colour = body[8], body[9]
            num_colours = len(body) // 3 if name == b"PLTE" else num_colours
        elif is_sound and name == b"tRNS" and not has_pixels and not transparency:
            transparency = bytes(body)
            if colour == PALETTE and 0 < len(body) <= num_colours:
                kept.append(chunk)
        elif is_sound and name == b"eXIf":
            exif = exif or bytes(body)
        elif is_sound and name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = bytes(body).partition(b"\0")
            if keyword in XMP_KEYWORDS + EXIF_KEYWORDS:
                texts.setdefault(keyword, _text(name, rest))
    return Png(
        data=b"".join(kept),
        depth=depth,
        transparent=_transparent_colour(transparency, colour, depth),
        orientation=_orientation(exif, texts),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Name and whole chunk, up to the end of the picture. A cut chunk comes as far as it goes."""
    view, at = memoryview(data), len(SIGNATURE)
    while at + 12 <= len(view):
        size = 12 + int.from_bytes(view[at : at + 4], "big")
        name = bytes(view[at + 4 : at + 8])
        yield name, view[at : at + size]
        at += size
        if name == b"IEND":
            return


def _transparent_colour(body: bytes, colour: int, depth: int) -> tuple[int, ...]:
    num_samples = {GREY: 1, RGB: 3}.get(colour)
    if num_samples is None or len(body) != 2 * num_samples:
        return ()
    samples = (sample & (1 << depth) - 1 for sample in struct.unpack(f">{num_samples}H", body))
    return tuple(sample * LEVELS.get(depth, 1) if colour == GREY else sample for sample in samples)


def _text(name: bytes, rest: bytes) -> bytes:
    """The text of a chunk, from what follows its keyword. Empty if it is damaged or too long."""
    is_compressed = name == b"zTXt"
    if name == b"tEXt":
        return rest
    if name == b"zTXt":
        rest = rest[1:]
    else:
        is_compressed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not is_compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _orientation(exif: bytes, texts: dict[bytes, bytes]) -> int:
    def raw(keyword: bytes) -> bytes:
        return from_raw_profile(texts.get(keyword, b"").decode("latin-1"))

    blocks = (exif, *(raw(keyword) for keyword in EXIF_KEYWORDS))
    exif = next((block for block in blocks if block), b"")
    return orientation_of(exif, texts.get(b"XML:com.adobe.xmp") or raw(b"Raw profile type xmp"))


def whitener(png: Png, picture: PilImage.Image) -> Callable[[Box], npt.NDArray[np.bool_]]:
    """Which pixels of a part of a 16-bit RGB picture have the transparent colour.

    Pillow keeps the high bytes of the samples. The low ones are read as if they came first in the file: of such samples
    Pillow keeps the second byte.

    Args:
        picture: As Pillow has read it from `png.data`.
    """
    with PngImageFile(BytesIO(png.data)) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
    colour = np.array(png.transparent)

    def is_white(box: Box) -> npt.NDArray[np.bool_]:
        high_equal = np.asarray(picture.crop(box)) == colour >> 8
        return (high_equal & (np.asarray(low.crop(box)) == colour & 255)).all(axis=-1)

    return is_white
