"""Clips in windows: each window of a clip is a row of its own, with the seconds at which it starts and ends.

A clip's frames are sampled as the job says, `--fps`, or `--num-frames` for each window, in one pass over the clip. The
frames of a window are sent as a short clip: H.264 of high quality, frame by frame at equal distances over the window.
A rest shorter than a tenth of a window belongs to the window before it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from mm.config import ModelConfig
from mm.data.media import FrameSampling, Pixels
from mm.errors import MmError
from mm.media import MediaBudget, open_clip
from serve.jobs.batch.rows import BadRow, Id, Medium, Row
from serve.jobs.discover import EXTENSIONS

SHORTEST_REST = 0.1
"""Of a window; a shorter rest of a clip is no window of its own."""
MANY = 1_000_000
"""Frames of a clip that is cut: its windows have to keep the limits, not the clip."""
QUALITY = {"crf": "10", "preset": "veryfast", "bf": "0"}
FACTS = ("clip", "start_s", "end_s")
"""Fields of a record that say which window of which clip it is about; None of a picture."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a job cuts clips.

    Attributes:
        window_s: Length of a window in seconds.
        model: Has the sampling of frames, and the limits.
        is_done: Whether a row's key needs nothing any more; its frames are not encoded then.
    """

    window_s: float
    model: ModelConfig
    is_done: Callable[[str], bool]

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, with the windows of each clip in place of it. All ids are texts, as those of windows are."""
        for found in rows:
            row = found if found.body is not None else replace(found, id=str(found.id), facts=dict.fromkeys(FACTS))
            if row.problem or row.body is not None or not any(map(_is_clip, row.media)):
                yield row
                continue
            medium, *others = row.media
            if others:
                yield replace(row, problem="it has a clip beside other media, and --window cuts rows with one clip")
            elif medium.url is not None:
                yield replace(row, problem="--window needs the clip's bytes or path, and it has an address")
            else:
                yield from self._windows(row, medium)

    def _windows(self, row: Row, medium: Medium) -> Iterator[Row]:
        """The windows of a clip; the row itself where the clip cannot be opened, so that it fails as it would whole."""
        try:
            data = medium.loaded().data or b""
            limits = replace(self.model.limits, max_sampled_frames=MANY, max_decoded_frames=MANY)
            with open_clip(data, self._sampling, MediaBudget(limits), chunk_frames=1) as clip:
                spans = spans_of(clip.duration_s, self.window_s)
                made = [_row(row, i, *span) for i, span in enumerate(spans)]
                if all(self.is_done(one.key) for one in made):
                    yield from made
                    return
                frames = ((chunk.timestamps_s[0], chunk.frames[0]) for chunk in clip.chunks(1))
                yield from self._filled(made, spans, frames)
        except BadRow as error:
            yield replace(row, problem=str(error))
        except MmError:
            yield replace(row, facts={**row.facts, "clip": row.id})

    @property
    def _sampling(self) -> FrameSampling:
        fps = self.model.fps if self.model.fps is not None else self.model.num_frames / self.window_s
        return FrameSampling(fps=fps, max_frames=MANY)

    def _filled(
        self, made: list[Row], spans: list[tuple[float, float]], frames: Iterator[tuple[float, Pixels]]
    ) -> Iterator[Row]:
        """Each window with its frames, as soon as the clip is read so far."""
        index, held = 0, list[Pixels]()
        last: Pixels | None = None
        try:
            for time_s, frame in frames:
                while index + 1 < len(made) and time_s >= spans[index][1]:
                    yield self._with_frames(made[index], spans[index], held or _one(last))
                    index, held = index + 1, []
                held.append(frame)
                last = frame
        except MmError as error:
            for row in made[index:]:
                yield replace(row, problem=f"the clip cannot be read so far: {error}")
            return
        while index < len(made):
            yield self._with_frames(made[index], spans[index], held or _one(last))
            index, held = index + 1, []

    def _with_frames(self, row: Row, span: tuple[float, float], frames: list[Pixels]) -> Row:
        if self.is_done(row.key):
            return row
        return replace(row, media=(Medium(kind="video", data=encoded(frames, span[1] - span[0]), path="window.mp4"),))


def _is_clip(medium: Medium) -> bool:
    try:
        return (medium.kind or medium.loaded().kind) == "video"
    except BadRow:
        return False  # it fails where it is asked about


def _one(frame: Pixels | None) -> list[Pixels]:
    """The frame on screen, for a window in which none begins."""
    return [] if frame is None else [frame]


def _row(row: Row, index: int, start_s: float, end_s: float) -> Row:
    facts: Mapping[str, Any] = {"clip": row.id, "start_s": round(start_s, 3), "end_s": round(end_s, 3)}
    return replace(row, id=window_id(row.id, index), facts=facts, media=())


def window_id(row_id: Id, index: int) -> str:
    """The id of a window: the clip's, with the window's number before the ending of a file's name."""
    stem, ending = os.path.splitext(str(row_id))
    if ending.lower() not in EXTENSIONS:
        stem, ending = str(row_id), ""
    return f"{stem}-w{index:05d}{ending}"


def spans_of(duration_s: float, window_s: float) -> list[tuple[float, float]]:
    """Start and end of each window in seconds; the last one ends with the clip."""
    count = max(1, math.ceil(duration_s / window_s - SHORTEST_REST - 1e-9))
    ends = [window_s * (i + 1) for i in range(count - 1)] + [duration_s]
    return list(zip([0.0, *ends[:-1]], ends, strict=True))


def encoded(frames: list[Pixels], duration_s: float) -> bytes:
    """Frames (H, W, 3) of one size as a clip of a length in seconds, evenly spread.

    Raises:
        BadRow: There are none.
    """
    import av

    if not frames:
        raise BadRow("the window has no frame that can be decoded")
    height, width = frames[0].shape[:2]
    rate = Fraction(len(frames) / max(duration_s, 1e-3)).limit_denominator(1000)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as clip:
        stream = clip.add_stream("libx264", rate=max(rate, Fraction(1, 1000)), options=QUALITY)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # chroma of half size has no odd sides
        for frame in frames:
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        clip.mux(stream.encode(None))
    return file.getvalue()
