"""Pictures in which the dropped visual tokens are dimmed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from mm.data.outputs import KeptMap
from serve.page.overlay import frame_of_slice, kept_mask

DROPPED, DIM = np.array([15.0, 23.0, 42.0]), 0.78
"""The colour to which dropped cells fade, and how much of it they get."""

SHEET_COLUMNS, GAP_PX, FRAME_SIDE_PX, PICTURE_SIDE_PX = 4, 4, 320, 960


def overlay(frames: Sequence[np.ndarray], item: KeptMap) -> PIL.Image.Image:
    """The pictures with the dropped cells dimmed, those of a clip in reading order on one sheet.

    Args:
        frames: uint8 (H, W, 3) each; a step of the grid takes the frame that stands for it.
    """
    mask, side_px = kept_mask(item), FRAME_SIDE_PX if item.kind == "video" else PICTURE_SIDE_PX
    shown = [_dimmed(frames[frame_of_slice(i, len(mask), len(frames))], kept, side_px) for i, kept in enumerate(mask)]
    width, height = shown[0].size
    columns = min(SHEET_COLUMNS, len(shown))
    num_rows = -(-len(shown) // columns)
    size = columns * (width + GAP_PX) - GAP_PX, num_rows * (height + GAP_PX) - GAP_PX
    sheet = PIL.Image.new("RGB", size, "white")
    for i, picture in enumerate(shown):
        sheet.paste(picture, (i % columns * (width + GAP_PX), i // columns * (height + GAP_PX)))
    return sheet


def _dimmed(pixels: np.ndarray, kept: np.ndarray, side_px: int) -> PIL.Image.Image:
    """A picture with a longest side of `side_px`; cells of `kept` (h, w) that are False are dimmed."""
    scale = side_px / max(pixels.shape[:2])
    width, height = (max(1, round(scale * side)) for side in (pixels.shape[1], pixels.shape[0]))
    picture = np.asarray(PIL.Image.fromarray(pixels).resize((width, height)), float)
    cells = PIL.Image.fromarray((~kept).astype(np.uint8)).resize((width, height), PIL.Image.Resampling.NEAREST)
    share = DIM * np.asarray(cells, float)[..., None]
    return PIL.Image.fromarray(((1 - share) * picture + share * DROPPED).round().astype(np.uint8))
