"""A kept map becomes exactly the shapes it should."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mm.data.outputs import KeptMap
from serve.page.overlay import border_path, dropped_path, frame_of_slice, has_layout, kept_mask

RECTANGLE = re.compile(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z")
LINE = re.compile(r"M(\d+) (\d+)([hv])(\d+)")


def painted(path: str, shape: tuple[int, int]) -> np.ndarray:
    """How often each cell is covered by the rectangles of `path`, which may hold nothing else."""
    counts = np.zeros(shape, int)
    assert RECTANGLE.sub("", path) == ""
    for x, y, width, back in RECTANGLE.findall(path):
        assert width == back
        counts[int(y), int(x) : int(x) + int(width)] += 1
    return counts


def test_mask_puts_raster_indices_into_their_cells() -> None:
    mask = kept_mask(KeptMap(kind="video", grid=(2, 2, 3), kept=(0, 5, 6, 10)))
    expected = [[[True, False, False], [False, False, True]], [[True, False, False], [False, True, False]]]
    assert mask.tolist() == expected


def test_dropped_path_of_a_known_mask() -> None:
    kept = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], bool)
    assert dropped_path(kept) == "M1 0h2v1h-2zM0 1h1v1h-1zM3 1h1v1h-1z"


def test_nothing_is_drawn_when_everything_is_kept() -> None:
    kept = np.ones((3, 5), bool)
    assert dropped_path(kept) == border_path(kept) == ""


@pytest.mark.parametrize("seed", range(5))
def test_dropped_path_covers_each_dropped_cell_once_and_no_kept_one(seed: int) -> None:
    kept = np.random.default_rng(seed).random((7, 11)) < 0.4
    assert np.array_equal(painted(dropped_path(kept), kept.shape), (~kept).astype(int))


@pytest.mark.parametrize("seed", range(5))
def test_border_separates_kept_from_dropped_and_nothing_else(seed: int) -> None:
    kept = np.random.default_rng(seed).random((6, 9)) < 0.5
    path = border_path(kept)
    assert LINE.sub("", path) == ""
    edges = set()
    for x, y, direction, length in LINE.findall(path):
        for step in range(int(length)):
            edges.add((int(x) + step, int(y), "h") if direction == "h" else (int(x), int(y) + step, "v"))
    expected = {(x, y, "h") for y in range(1, 6) for x in range(9) if kept[y, x] != kept[y - 1, x]}
    expected |= {(x, y, "v") for y in range(6) for x in range(1, 9) if kept[y, x] != kept[y, x - 1]}
    assert edges == expected


def test_a_row_of_tokens_without_a_grid_has_no_layout() -> None:
    assert not has_layout(KeptMap(kind="image", grid=(1, 1, 577), kept=(0,)))
    assert has_layout(KeptMap(kind="image", grid=(1, 24, 24), kept=(0,)))
    assert has_layout(KeptMap(kind="video", grid=(17, 8, 8), kept=(0,)))
    assert not has_layout(KeptMap(kind="image", grid=(17, 8, 8), kept=(0,)))
    assert has_layout(KeptMap(kind="image", grid=(1, 1, 1), kept=(0,)))


def test_steps_that_join_frames_show_frames_of_their_own() -> None:
    assert [frame_of_slice(step, 8, 8) for step in range(8)] == list(range(8))
    assert [frame_of_slice(step, 4, 8) for step in range(4)] == [0, 2, 4, 6]
    assert [frame_of_slice(step, 4, 3) for step in range(4)] == [0, 0, 1, 2]
