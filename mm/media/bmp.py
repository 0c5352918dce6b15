"""What Pillow gets wrong about BMP files: short grey palettes, and alpha that was never written."""

from __future__ import annotations

import struct
from typing import Any, cast

from PIL import ImagePalette
from PIL.BmpImagePlugin import BmpImageFile

FILE_HEADER_BYTES = 14
RAW_MODES = {1: "P;1", 4: "P;4", 8: "P"}
"""Bits of an index to Pillow's name for the layout."""


def use_palette(picture: BmpImageFile, data: bytes) -> None:
    """Read a picture through its palette, if Pillow took the palette as grey and reads indices of another width.

    Pillow reads one bit a pixel if there are two grey colours, and eight bits if there are more, whatever the header
    says. Call it before the picture is loaded.
    """
    (header_bytes,) = struct.unpack_from("<I", data, FILE_HEADER_BYTES)
    (bits,) = struct.unpack_from("<H", data, FILE_HEADER_BYTES + (10 if header_bytes == 12 else 14))
    tile = picture.tile[0]
    is_run_length = tile.codec_name == "bmp_rle"
    if bits not in RAW_MODES or (bits == {"1": 1, "L": 8}.get(picture.mode, bits) and not is_run_length):
        return
    padding = 3 if header_bytes == 12 else 4
    start = FILE_HEADER_BYTES + header_bytes
    (pixels_at,) = struct.unpack_from("<I", data, 10)
    num_colours = min(max(pixels_at - start, 0) // padding, 1 << bits)
    if picture.mode == "P" or not num_colours:
        return
    layout = "P" if is_run_length else RAW_MODES[bits]
    cast(Any, picture)._mode = "P"
    palette = data[start : start + padding * num_colours]
    picture.palette = ImagePalette.raw("BGRX" if padding == 4 else "BGR", palette)
    picture.tile = [tile._replace(args=(layout, *cast("tuple[Any, ...]", tile.args)[1:]))]


def drop_empty_alpha(picture: BmpImageFile) -> None:
    """Show a picture whose alpha is 0 everywhere as opaque, as browsers and ffmpeg do: its writer left alpha out."""
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0):
        picture.putalpha(255)
