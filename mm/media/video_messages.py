"""What the video child is asked for, and what it answers. Both sides import this file, so it imports no decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mm.media.sample import choose, num_wanted

if TYPE_CHECKING:
    from mm.data.media import Pixels


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """What the parent wants: the sampling, and the limits that only a decoder can enforce."""

    num_frames: int
    fps: float | None
    max_frames: int
    max_pixels: int
    max_decoded_frames: int

    def num_wanted(self, num_clip_frames: int, duration_s: float) -> int:
        """Number of frames to sample; see `mm.media.sample.num_wanted`."""
        return num_wanted(num_clip_frames, duration_s, self.num_frames, self.fps, self.max_frames)

    def choose(self, times_s: list[float], duration_s: float) -> list[int]:
        """Which frames are sampled; see `mm.media.sample.choose`."""
        return choose(times_s, duration_s, self.num_wanted(len(times_s), duration_s))


class Plan(NamedTuple):
    """What will be sent: the size of all frames, and the largest number of them."""

    width: int
    height: int
    num_frames: int
    duration_s: float


class Frame(NamedTuple):
    """One frame: its time from the clip's start in seconds, and uint8 RGB (H, W, 3)."""

    time_s: float
    pixels: Pixels


class Done(NamedTuple):
    """The end, and how many parts of the file that were read could not be decoded, or only in part."""

    num_damaged: int


Message = Plan | Frame | Done


class Refused(Exception):
    """The clip cannot be used.

    Args:
        reason: A key of `MEDIA_REASONS`.
        limit: The limit that was exceeded, if the reason has one.
        given: Name of the codec that is not supported.
    """

    def __init__(self, reason: str, limit: float | None = None, given: str = "") -> None:
        super().__init__(reason, limit, given)
        self.reason, self.limit, self.given = reason, limit, given
