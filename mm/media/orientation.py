"""How a stored picture has to be turned to be upright, as `PIL.ImageOps.exif_transpose` finds it.

The first directory of EXIF decides. XMP counts if EXIF does not mention the orientation. Both are read here and not by
Pillow, which warns and raises on damage that has no effect on the orientation.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import cast

import numpy as np

from mm.data.media import Pixels

TAG = 0x0112
FORMATS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
"""TIFF's whole-number types and how `struct` reads one. EXIF wants a SHORT (3); other types occur and are read too."""

IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9])""")


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8. 1, which turns nothing, if neither says anything usable."""
    found = _from_exif(exif)
    if found is None:
        match = IN_XMP.search(xmp)
        found = int(match[1]) if match else 1
    return found if 1 <= found <= 8 else 1


def _from_exif(exif: bytes) -> int | None:
    """The orientation in the first directory. None if it is not there or cannot be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == TAG and kind in FORMATS and count == 1:
                return struct.unpack_from(order + FORMATS[kind], tiff, at + 8)[0]
    except struct.error:
        pass  # a damaged block; the picture itself may be intact
    return None


def from_raw_profile(text: str) -> bytes:
    """The bytes of a "Raw profile type ..." text of PNG: a name and a length, then hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def orientation_in(info: Mapping[str | tuple[int, int], object]) -> int:
    """The same from the `info` of a picture that Pillow has read."""
    exif = _as_bytes(info.get("exif"))
    raw = info.get("Raw profile type exif")
    if not exif and isinstance(raw, str):
        exif = from_raw_profile(raw)
    return orientation_of(exif, _as_bytes(info.get("XML:com.adobe.xmp")) or _as_bytes(info.get("xmp")))


def _as_bytes(value: object) -> bytes:
    if isinstance(value, tuple):  # from TIFF
        value = cast("tuple[object, ...]", value)[0] if value else b""
    if isinstance(value, str):
        return value.encode(errors="replace")
    return value if isinstance(value, bytes) else b""


def as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of an upright picture (H, W, ...) in the axes in which its file stores it; writing to it turns."""
    view = upright.swapaxes(0, 1) if orientation >= 5 else upright
    if orientation in (2, 3, 7, 8):
        view = view[:, ::-1]
    return view[::-1] if orientation in (3, 4, 6, 7) else view


def empty_upright(width: int, height: int, orientation: int) -> Pixels:
    """(H, W, 3) for a picture that its file stores with this width and height."""
    return np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
