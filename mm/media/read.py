"""`mm.read_media`: a picture or clip as an encoder would get it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image as PilImage

from mm.config import MediaLimits, SourcePolicy
from mm.data.media import FrameSampling, Image, Kind, MediaFile, MediaSource, Pixels
from mm.errors import InvalidRequest, MediaError
from mm.media.containers import PICTURE_FORMATS, sniff
from mm.media.data_url import is_data_url, read_data_url
from mm.media.limits import MediaBudget
from mm.media.loading import decode, fetch_item

NUM_SNIFFED = 4096
"""Bytes at the start of a file that decide its kind."""

STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""AVIF and HEIF share MP4's container. They are pictures, of a format that is refused by name."""


@dataclass(frozen=True, kw_only=True)
class MediaFrames:
    """The pixels of a picture or clip, upright and on white.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB. A picture has T = 1.
        times_s: Presentation time of each frame in seconds from the clip's start, length T. (0.0,) for a picture.
        duration_s: Length of the whole clip in seconds. 0.0 for a picture.
        num_damaged: Parts of a clip's file that were needed and could not be decoded, or only in part.
    """

    frames: Pixels
    times_s: tuple[float, ...]
    duration_s: float
    num_damaged: int = 0


def read_media(
    media: str | Path | bytes | PilImage.Image | Pixels,
    num_frames: int | None = None,
    fps: float | None = None,
    *,
    kind: Kind | None = None,
    limits: MediaLimits | None = None,
) -> MediaFrames:
    """Fetch, decode and sample one picture or clip exactly as for an encoder.

    Args:
        media: A path, encoded file bytes, a `data:` URL, a PIL image, or a uint8 array (H, W, 3) or (H, W).
        num_frames: Frames of a clip, evenly spread over its length; a shorter clip gives all it has. 8 by default.
        fps: Frames per second of clip time in place of `num_frames`, 32 at most.
        kind: "image" or "video". By default the file's first bytes decide. A GIF, PNG or WebP is a picture, unless
            `num_frames` or `fps` is given and it is animated.
        limits: Bounds of size and length. By default those of a server.

    Raises:
        MediaError: The file cannot be read or decoded, or is larger than the limits.
        InvalidRequest: Both `num_frames` and `fps` are given, one of them is out of range, `kind` is unknown, or
            the pixels are of a form that cannot be used.
    """
    frames = _sampling(num_frames, fps)
    if kind is not None and kind not in get_args(Kind):
        raise InvalidRequest(f"kind was {kind!r}; it has to be 'image' or 'video'", "kind")
    budget = MediaBudget(limits or MediaLimits())
    _check_form(media)
    source = MediaSource(kind=kind or _guess(media, frames is not None), source=media)
    fetched = fetch_item(source, SourcePolicy(allow_paths=True), budget)
    if isinstance(fetched, MediaFile):
        fetched = decode(fetched, budget, frames or FrameSampling())
    if isinstance(fetched, Image):
        return MediaFrames(frames=fetched.pixels[None], times_s=(0.0,), duration_s=0.0)
    return MediaFrames(
        frames=fetched.frames,
        times_s=fetched.timestamps_s,
        duration_s=fetched.duration_s,
        num_damaged=fetched.num_damaged,
    )


def _check_form(media: object) -> None:
    if not isinstance(media, bytes | str | Path | PilImage.Image | np.ndarray):
        allowed = "a path, bytes, a data: URL, a PIL image or an array"
        raise InvalidRequest(f"cannot read a {type(media).__name__}; give {allowed}", "media")


def _sampling(num_frames: int | None, fps: float | None) -> FrameSampling | None:
    if num_frames is not None and fps is not None:
        raise InvalidRequest("give num_frames or fps, not both", "fps")
    if fps is not None:
        return FrameSampling(fps=fps)
    return None if num_frames is None else FrameSampling(num_frames=num_frames)


def _guess(media: str | Path | bytes | PilImage.Image | Pixels, wants_frames: bool) -> Kind:
    """The kind of an item by its first bytes. "image" if they are unknown; decoding then gives the right error."""
    if isinstance(media, PilImage.Image | np.ndarray):
        return "image"
    start = _first_bytes(media)
    container = None if start[4:8] == b"ftyp" and start[8:12] in STILL_BRANDS else sniff(start)
    is_clip = container is not None and (container not in PICTURE_FORMATS or wants_frames)
    return "video" if is_clip else "image"


def _first_bytes(media: str | Path | bytes) -> bytes:
    if isinstance(media, bytes):
        return media[:NUM_SNIFFED]
    if isinstance(media, str) and is_data_url(media):
        with contextlib.suppress(MediaError):
            return read_data_url(media, "video", MediaBudget(MediaLimits()))[:NUM_SNIFFED]
        return b""
    with contextlib.suppress(OSError, ValueError):
        if Path(media).is_file():  # reading a pipe could block
            with open(media, "rb") as file:
                return file.read(NUM_SNIFFED)
    return b""
