"""A decoded frame of PyAV to RGB pixels: upright, on white, of a given size. The video child imports this file."""

from __future__ import annotations

import gc
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    from mm.data.media import Pixels


class Converter:
    """Turns the frames of one clip into pixels.

    The file's colour matrix and range are applied. HDR is not mapped to SDR, interlaced fields are not taken apart, the
    siting of chroma is not looked at, and pixels are treated as square. ffmpeg's command line does the same.
    """

    def __init__(self) -> None:
        self._kind: tuple[int, int, str] | None = None
        self._graph: Any = None

    def rgb(self, frame: VideoFrame, size: tuple[int, int] | None) -> Pixels:
        """uint8 RGB (H, W, 3), turned as the file's display matrix asks, transparent parts white.

        Args:
            size: Width and height that the upright frame is scaled to. None keeps its own.
        """
        pixels = _rgb(self._plain(frame), size)
        # A frame and its side data refer to each other in PyAV. Only this frees the last one; `prepare` makes it fast.
        gc.collect()
        return pixels

    def _plain(self, frame: Any) -> Any:
        """The frame without its marks for interlacing and chroma siting, by which the library would convert."""
        from av.filter import Graph

        kind = frame.width, frame.height, frame.format.name
        if kind != self._kind:
            self._kind, self._graph = kind, Graph()
            self._graph.threads = 1
            source = self._graph.add("buffer", "video_size={}x{}:pix_fmt={}:time_base=1/1".format(*kind))
            marks = self._graph.add("setparams", "field_mode=prog:chroma_location=unspecified")
            self._graph.link_nodes(source, marks, self._graph.add("buffersink")).configure()
        self._graph.vpush(frame)
        return self._graph.vpull()


def _rgb(frame: Any, size: tuple[int, int] | None) -> Pixels:
    is_transposed, flips_x, flips_y = orientation(frame)
    stored = (size[::-1] if is_transposed else size) if size else (frame.width, frame.height)
    is_transparent = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    name = "rgba" if is_transparent else "rgb24"
    # threads=1: the limited process must not start a thread for each processor.
    pixels = frame.reformat(*stored, name, interpolation="BICUBIC", threads=1).to_ndarray()
    if is_transparent:
        pixels = on_white(pixels)
    if is_transposed:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[:: -1 if flips_y else 1, :: -1 if flips_x else 1])


def on_white(rgba: Pixels) -> Pixels:
    """RGB (H, W, 3) of RGBA (H, W, 4) on a white ground."""
    wide = rgba.astype(np.uint16)
    alpha = wide[..., 3:]
    return ((wide[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Whether rows and columns have to be exchanged, and then left and right, and top and bottom.

    The display matrix maps x to (a, b) and y to (c, d). An angle between two right angles is taken to the nearest.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
