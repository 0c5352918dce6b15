"""Pillow's pixel modes to RGB. Colour profiles and gamma are not applied, as in vLLM and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from mm.data.media import Pixels
from mm.media.orientation import as_stored, empty_upright

STRIP_PIXELS = 1 << 20
"""Pixels that are converted at a time, so that conversions need little memory beside the picture and its result."""

OPAQUE_MODES = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "I;16L", "I;16B", "I;16N")
SAMPLED_MODES = ("1", "L", "RGB", "I", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes in which `info["transparency"]` is a colour and not an index."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def to_rgb(
    picture: PilImage.Image,
    orientation: int = 1,
    is_white: Callable[[Box], npt.NDArray[np.bool_]] | None = None,
) -> Pixels:
    """uint8 (H, W, 3), upright, on white. 16-bit greys are scaled to 8 bits, palettes are resolved.

    Args:
        orientation: 1 to 8, how the picture is stored.
        is_white: (h, w): which pixels of a part become white, beside those of `info["transparency"]`.
    """
    picture.load()
    width, height = picture.size
    upright = empty_upright(width, height, orientation)
    stored = as_stored(upright, orientation)
    rows = max(STRIP_PIXELS // width, 1)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        rgb = _rgb(picture.crop(box))
        if is_white is not None:
            rgb = np.where(is_white(box)[..., None], np.uint8(255), rgb)
        stored[box[1] : box[3]] = rgb
    return upright


def _rgb(picture: PilImage.Image) -> Pixels:
    if picture.mode in SAMPLED_MODES and "transparency" in picture.info:
        samples, colour = np.asarray(picture), np.array(picture.info["transparency"])
        is_white = samples == (colour.astype(bool) if picture.mode == "1" else colour)
        is_white = is_white.all(axis=-1) if picture.mode == "RGB" else is_white
        return np.where(is_white[..., None], np.uint8(255), _opaque(picture))
    if picture.mode not in OPAQUE_MODES or "transparency" in picture.info:
        picture = picture.convert("LA") if picture.mode == "La" else picture
        return _on_white(picture.convert("RGBA"))
    return _opaque(picture)


def _opaque(picture: PilImage.Image) -> Pixels:
    if picture.mode.startswith("I"):
        return np.stack([_to_8_bits(np.asarray(picture))] * 3, axis=-1)
    return np.asarray(picture.convert("RGB"))


def _to_8_bits(grey: npt.NDArray[np.integer[Any]]) -> Pixels:
    """0..65535 to the nearest of 0..255. Pillow's own conversion would clip every value above 255 to white."""
    wide = np.clip(grey, 0, 65535).astype(np.uint32)
    return ((wide + 128) // 257).astype(np.uint8)


def _on_white(picture: PilImage.Image) -> Pixels:
    canvas = PilImage.new("RGB", picture.size, (255, 255, 255))
    canvas.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return np.asarray(canvas)
