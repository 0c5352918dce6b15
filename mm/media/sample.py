"""Which frames of a clip are looked at.

Plain numbers in and out; used inside the video child, so standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def num_wanted(num_clip_frames: int, duration_s: float, num_frames: int, fps: float | None, max_frames: int) -> int:
    """How many frames to take.

    `num_frames`, or duration x fps (nearest, at least 1, at most `max_frames`); never more than exist.
    """
    if fps is not None:
        # Clamped before int(): a hostile duration may be too large for any integer type.
        num_frames = int(max(1.0, min(duration_s * fps + 0.5, max_frames)))
    return min(num_frames, num_clip_frames)


def choose(times_s: Sequence[float], duration_s: float, num_wanted: int) -> list[int]:
    """Indices of `num_wanted` different frames, ascending, evenly spread over the clip's time.

    The clip is cut into equal spans of time and the frame on screen at the centre of each span is taken. Where one
    frame is on screen in several centres (variable frame rate), the next ones are taken, so the count always is what
    was asked for.

    Args:
        times_s: Ascending presentation times from the clip's start, one per frame.
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
