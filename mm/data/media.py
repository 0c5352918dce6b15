"""The media of a request: as they were sent, fetched, and decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mm.settings import setting

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Kind = Literal["image", "video"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Image:
    """A decoded picture.

    Attributes:
        pixels: uint8 RGB (H, W, 3).
        content_hash: Hash of the content, for cache keys.
    """

    pixels: Pixels
    content_hash: str

    @property
    def kind(self) -> Kind:
        return "image"


@dataclass(frozen=True, kw_only=True)
class Video:
    """The sampled frames of a clip.

    Attributes:
        frames: uint8 RGB (T, H, W, 3), in order of time.
        timestamps_s: Presentation time of each frame in seconds from the clip's start, length T.
        duration_s: Length of the whole clip in seconds.
        content_hash: Hash of the content and of the frame sampling, for cache keys.
        num_damaged: Parts of the file that were needed for these frames and could not be decoded, or only in part.
    """

    frames: Pixels
    timestamps_s: tuple[float, ...]
    duration_s: float
    content_hash: str
    num_damaged: int = 0

    @property
    def kind(self) -> Kind:
        return "video"


@dataclass(frozen=True, kw_only=True)
class FrameChunk:
    """Consecutive sampled frames of a clip.

    Attributes:
        frames: uint8 RGB (T, H, W, 3), in order of time.
        timestamps_s: Presentation time of each frame in seconds from the clip's start, length T.
        first: Index of the first of them among all sampled frames of the clip.
    """

    frames: Pixels
    timestamps_s: tuple[float, ...]
    first: int


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """A media item as the sender gave it. Nothing of it was read yet.

    Attributes:
        kind: The kind that the sender declared.
        source: Encoded file bytes, a local path, a `data:`, `http:` or `https:` URL, or pixels: a PIL image, or for
            images a uint8 array (H, W, 3) or (H, W).
        param: The request field it came from, for error messages.
    """

    kind: Kind
    source: bytes | Path | str | PilImage | Pixels
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """A fetched and still encoded item. It has drawn its bytes from the request's budget.

    Attributes:
        kind: The kind that the sender declared.
        data: The whole file.
        param: The request field it came from, for error messages.
    """

    kind: Kind
    data: bytes
    param: str | None = None


Media = MediaSource | MediaFile | Image | Video


class Prepared(Protocol):
    """A picture or clip resized and cut as its encoder wants it. Only that encoder knows more of it."""

    @property
    def kind(self) -> Kind: ...


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a clip the encoder gets.

    Attributes:
        num_frames: Number of frames, evenly spread over the clip. A shorter clip gives all it has. Ignored with `fps`.
        fps: Frames per second of clip time. None samples by number.
        max_frames: Upper bound with `fps`. A clip that needs more frames is sampled evenly at this number.
    """

    num_frames: int = setting(8, min=1, help="Frames taken of a clip, evenly spread.")
    fps: float | None = setting(None, above=0, max=1000, help="Frames per second taken of a clip.")
    max_frames: int = setting(32, hidden=True, help="Upper bound with `fps`.")
