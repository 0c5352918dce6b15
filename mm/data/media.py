"""Media of a request: where they come from, and what they are once decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """A decoded picture.

    Attributes:
        pixels: uint8 RGB (H, W, 3).
        content_hash: Names the content for caches; framed over kind, size and bytes.
    """

    pixels: np.ndarray
    content_hash: str

    @property
    def kind(self) -> Kind:
        return "image"


@dataclass(frozen=True, kw_only=True)
class Video:
    """The sampled frames of a clip.

    Attributes:
        frames: uint8 RGB (T, H, W, 3), in order of time.
        timestamps_s: True presentation time of each frame, seconds from the clip's start, length T.
        duration_s: Length of the whole clip in seconds.
        content_hash: Names the content and the sampling for caches.
    """

    frames: np.ndarray
    timestamps_s: tuple[float, ...]
    duration_s: float
    content_hash: str

    @property
    def kind(self) -> Kind:
        return "video"


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """Where an item's bytes come from: bytes, a path, or a `data:`, `http:` or `https:` URL.

    Attributes:
        kind: What the sender says it is.
        source: Encoded file bytes, a local path, or a URL.
        param: The request field it came from, for error messages.
    """

    kind: Kind
    source: bytes | Path | str
    param: str | None = None


Media = MediaSource | Image | Video


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a clip are looked at.

    Attributes:
        num_frames: This many, evenly spread over the clip (fewer when it has fewer). Ignored with `fps`.
        fps: Frames per second of clip time; None samples by count.
        max_frames: Upper bound with `fps`; a clip that needs more is spread over this many.
    """

    num_frames: int = 8
    fps: float | None = None
    max_frames: int = 32
