"""Which frames of a clip are sampled.

The video child imports this file, so it uses the standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def num_wanted(num_clip_frames: int, duration_s: float, num_frames: int, fps: float | None, max_frames: int) -> int:
    """Number of frames to sample: `num_frames`, or with `fps` the nearest integer to duration x fps.

    With `fps` it is at least 1 and at most `max_frames`. It never exceeds the number of frames of the clip.
    """
    if fps is not None:
        # Clamped before int(), since a hostile duration may be infinite.
        num_frames = int(max(1.0, min(duration_s * fps + 0.5, max_frames)))
    return min(num_frames, num_clip_frames)


def choose(times_s: Sequence[float], duration_s: float, num_wanted: int) -> list[int]:
    """Indices of `num_wanted` different frames, ascending and evenly spread over the clip's time.

    The clip is cut into equal spans of time, and the frame on screen at the centre of each span is sampled. With a
    variable frame rate one frame may be on screen at several centres. Then the frames that follow it are sampled
    instead, so that the number of frames is always `num_wanted`.

    Args:
        times_s: Presentation time of each frame from the clip's start, ascending.
        duration_s: End of the last frame.
        num_wanted: 1 to len(times_s).
    """
    span_s = duration_s / num_wanted
    chosen: list[int] = []
    for k in range(num_wanted):
        on_screen = max(bisect_right(times_s, (k + 0.5) * span_s) - 1, 0)
        after_previous = max(on_screen, chosen[-1] + 1) if chosen else on_screen
        chosen.append(min(after_previous, len(times_s) - num_wanted + k))
    return chosen
