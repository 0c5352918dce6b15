"""A kept map as shapes over a picture: which cells were dropped, and where kept and dropped meet.

Shapes are in cells and stretched over the picture by whoever draws them, so they fit any size. Assumes that the grid
covers the whole picture, as it does for models whose processor resizes without cropping.
"""

from __future__ import annotations

import numpy as np

from mm.data.outputs import KeptMap


def kept_mask(item: KeptMap) -> np.ndarray:
    """bool (t, h, w): True where the cell's token reached the decoder."""
    mask = np.zeros(item.grid, dtype=bool)
    mask.reshape(-1)[list(item.kept)] = True
    return mask


def has_layout(item: KeptMap) -> bool:
    """Whether the cells of the grid have a known position in the picture.

    A tower without a grid reports all tokens in one row. A tower that cuts an image into crops reports one grid each.
    """
    t, h, w = item.grid
    return (h > 1 or w == 1) and (t == 1 or item.kind == "video")


def frame_of_slice(time_index: int, num_slices: int, num_frames: int) -> int:
    """The frame that stands for one step of the grid's time axis, where a tower joins several frames to a step."""
    return min(time_index * num_frames // num_slices, num_frames - 1)


def dropped_path(kept: np.ndarray) -> str:
    """An SVG path over the dropped cells of `kept` (h, w), one rectangle per run in a row."""
    return "".join(
        f"M{start} {y}h{stop - start}v1h{start - stop}z" for y, row in enumerate(~kept) for start, stop in _runs(row)
    )


def border_path(kept: np.ndarray) -> str:
    """An SVG path along the edges between kept and dropped cells of `kept` (h, w)."""
    across = kept[1:] != kept[:-1]
    down = kept[:, 1:] != kept[:, :-1]
    horizontal = [f"M{start} {y + 1}h{stop - start}" for y, row in enumerate(across) for start, stop in _runs(row)]
    vertical = [f"M{x + 1} {start}v{stop - start}" for x, row in enumerate(down.T) for start, stop in _runs(row)]
    return "".join(horizontal + vertical)


def _runs(row: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True in `row` (n,)."""
    steps = np.diff(np.concatenate(([False], row, [False])).astype(np.int8))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))
