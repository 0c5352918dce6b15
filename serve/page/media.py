"""The pictures that the page shows of an upload: the frames that a model gets, small enough for a page.

The server gets the file as it is; nothing here changes the question.
"""

from __future__ import annotations

import functools
import io
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PilImage

from mm.config import MediaLimits
from mm.data.media import FrameSampling
from mm.media import MediaBudget, decode_image, decode_video
from serve.client import data_url
from serve.page.request import Upload

IMAGE_SIDE_PX = 960
FRAME_SIDE_PX = 400
THUMBNAIL_SIDE_PX = 192


class NotMedia(Exception):
    """By its name, the file is neither a picture nor a clip."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Pictures for an `<img>` each, as data URLs, with their width over height, and their times for a clip."""

    urls: tuple[str, ...]
    aspect_ratio: float
    timestamps_s: tuple[float, ...] = ()


def read_upload(path: str | Path) -> Upload:
    """A file from disk.

    Raises:
        NotMedia: See the class.
    """
    path = Path(path)
    mime = mimetypes.guess_type(path.name)[0] or ""
    if not mime.startswith(("image/", "video/")):
        raise NotMedia(f"{path.name} is neither an image nor a clip.")
    return Upload(name=path.name, mime=mime, data=path.read_bytes())


@functools.lru_cache(maxsize=8)
def preview(upload: Upload, num_frames: int) -> Preview:
    """The picture, or the frames of the clip that `num_frames` samples.

    Raises:
        MmError: It cannot be decoded here.
    """
    frames, timestamps_s = _decoded(upload, num_frames)
    side_px = FRAME_SIDE_PX if timestamps_s else IMAGE_SIDE_PX
    urls = tuple(_jpeg_url(_shrunk(frame, side_px)) for frame in frames)
    height, width = frames[0].shape[:2]
    return Preview(urls=urls, aspect_ratio=width / height, timestamps_s=timestamps_s)


def thumbnail(upload: Upload) -> PilImage.Image:
    """A small picture that stands for the upload.

    Raises:
        MmError: It cannot be decoded here.
    """
    return _shrunk(_decoded(upload, 1)[0][0], THUMBNAIL_SIDE_PX)


def _decoded(upload: Upload, num_frames: int) -> tuple[Sequence[np.ndarray], tuple[float, ...]]:
    """uint8 pictures (H, W, 3), and their times for a clip."""
    budget = MediaBudget(MediaLimits())
    if upload.kind == "image":
        return [decode_image(upload.data, budget).pixels], ()
    video = decode_video(upload.data, FrameSampling(num_frames=num_frames), budget)
    return list(video.frames), video.timestamps_s


def _shrunk(pixels: np.ndarray, side_px: int) -> PilImage.Image:
    """A picture whose longest side is at most `side_px`."""
    picture = PilImage.fromarray(pixels)
    picture.thumbnail((side_px, side_px))
    return picture


def _jpeg_url(picture: PilImage.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return data_url("image/jpeg", buffer.getvalue())
