"""One clip that a child decodes, read chunk by chunk."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from mm.config import MediaLimits
from mm.data.media import FrameChunk, FrameSampling, Pixels
from mm.errors import MEDIA_REASONS, EngineError, MediaError
from mm.media.child_pool import LIMIT_STATUSES
from mm.media.limits import MediaBudget
from mm.processes.child import Child
from mm.processes.wire import WireClosed, read_header, write_message

ALLOWED_FORMATS = (
    "MP4, MOV, WebM, MKV, AVI, MPEG-TS, MPEG-PS, FLV, Ogg, ASF, GIF, APNG or animated WebP, with H.264, H.265, VP8, "
    "VP9, AV1, MPEG-1, MPEG-2, MPEG-4, MJPEG, ProRes, FFV1 or another codec of docs/clips.md"
)
START_TIMEOUT_S = 60.0
SPAN_FRAMES = 128
"""So many sampled frames may take the decoding time of the limits. A clip of an hour has many times as many."""
CODEC_NAME = re.compile(r"[a-z0-9_]{1,24}")


class ClipReader:
    """The sampled frames of a clip, while a child decodes them. Made by `mm.media.open_clip`.

    Every message of the child is checked, since the clip may control it.

    Attributes:
        width, height: Size of every frame.
        num_frames: Frames that will come. Fewer if some cannot be decoded.
        duration_s: Length of the clip in seconds.
        num_damaged: Parts of the file that were needed and are broken. Known after the last chunk.
        max_chunk_frames: The largest chunk that may be asked for.
    """

    def __init__(self, child: Child, data: bytes, sampling: FrameSampling, budget: MediaBudget) -> None:
        self._child, self._data, self._sampling, self._budget = child, data, sampling, budget
        self._left_s = budget.limits.decode_wall_s * _num_spans(sampling, budget.limits)
        self.width = self.height = self.num_frames = self.num_damaged = self._num_read = 0
        self.duration_s = 0.0
        self.max_chunk_frames = 1
        self._last_time_s = 0.0
        self._is_done = False

    def begin(self) -> None:
        """Send the clip, receive the plan and draw it from the budget, except for the pixels.

        Raises:
            MediaError: The clip cannot be used.
            EngineError: The child does not start.
        """
        self._await_ready()
        try:
            with self._child.deadline(self._left_s):
                began = time.monotonic()
                write_message(self._child.pipe_in, _request(self._sampling, self._budget.limits), self._data)
                self._data = b""
                plan = self._next("plan")
                self._left_s -= time.monotonic() - began
        except (WireClosed, BrokenPipeError):
            raise self._death() from None
        self.width, self.height, self.num_frames = (int(plan[name]) for name in ("width", "height", "num_frames"))
        self.duration_s = float(plan["duration_s"])
        wanted = self._sampling.num_frames if self._sampling.fps is None else self._sampling.max_frames
        if not 1 <= self.num_frames <= wanted or not self.duration_s >= 0:
            raise MediaError("undecodable", "video")
        self._budget.take_duration(self.duration_s)
        self._budget.take_frames(self.num_frames)
        self._budget.check_size("video", self.width, self.height)

    def chunks(self, num_frames: int) -> Iterator[FrameChunk]:
        """All frames, `num_frames` at a time; the last chunk may be shorter. Can be read once.

        The next chunk is received in a thread while the caller uses the present one.

        Raises:
            MediaError: The child ended early, or gave no frame at all.
        """
        assert 1 <= num_frames <= self.max_chunk_frames, "more than was drawn from the budget"
        with ThreadPoolExecutor(1, thread_name_prefix="clip") as reader:
            try:
                ahead = reader.submit(self._read, num_frames)
                while (chunk := ahead.result()) is not None:
                    ahead = reader.submit(self._read, num_frames)
                    yield chunk
            except WireClosed:
                raise self._death() from None
            finally:
                self._child.kill()  # ends a read that nobody waits for any more
        if not self._num_read:
            raise MediaError("undecodable", "video")

    def close(self) -> None:
        """End the child. Safe to call again."""
        self._child.close()

    def _read(self, num_frames: int) -> FrameChunk | None:
        """The next chunk, or None after the last frame."""
        if self._is_done:
            return None
        first = self._num_read
        frames = np.empty((min(num_frames, self.num_frames - first), self.height, self.width, 3), np.uint8)
        times_s: list[float] = []
        began = time.monotonic()
        with self._child.deadline(self._left_s):
            for frame in frames:
                if (time_s := self._receive(frame)) is None:
                    break
                times_s.append(time_s)
            if self._num_read == self.num_frames and not self._is_done:
                self._end(self._next("done"))
        self._left_s -= time.monotonic() - began
        chunk = FrameChunk(frames=frames[: len(times_s)], timestamps_s=tuple(times_s), first=first)
        return chunk if times_s else None

    def _receive(self, frame: Pixels) -> float | None:
        """Fill one frame (H, W, 3) directly from the pipe. Returns its time, or None if no more frames come."""
        header = self._next("frame", "done")
        if header["type"] == "done":
            self._end(header)
            return None
        time_s = float(header["time_s"])
        has_size = (header["height"], header["width"], header["num_bytes"]) == (*frame.shape[:2], frame.nbytes)
        if not has_size or not self._last_time_s <= time_s <= self.duration_s:
            raise MediaError("undecodable", "video")
        view = frame.data.cast("B")
        if cast(Any, self._child.pipe_out).readinto(view) != len(view):
            raise WireClosed
        self._last_time_s, self._num_read = time_s, self._num_read + 1
        return time_s

    def _end(self, header: dict[str, Any]) -> None:
        self.num_damaged, self._is_done = int(header["num_damaged"]), True

    def _await_ready(self) -> None:
        try:
            with self._child.deadline(START_TIMEOUT_S):
                self._next("ready")
        except (WireClosed, MediaError):
            raise EngineError(f"the video child does not start (status {self._child.close()})") from None

    def _next(self, *expected: str) -> dict[str, Any]:
        """The next message's header.

        Raises:
            MediaError: The child refuses the clip, or sends another message than expected.
            WireClosed: It ended.
        """
        header = read_header(self._child.pipe_out)
        if header.get("type") == "refused" and header.get("reason") in MEDIA_REASONS:
            raise MediaError(header["reason"], "video", header.get("limit"), _allowed(header))
        if header.get("type") not in expected:
            raise MediaError("undecodable", "video")
        return header

    def _death(self) -> MediaError:
        """The error for a child that ended early."""
        status = self._child.close()
        is_limit = self._child.hit_deadline or status in LIMIT_STATUSES
        return MediaError("decode_limit" if is_limit else "undecodable", "video")


def _allowed(header: dict[str, Any]) -> str:
    if header["reason"] != "unsupported_format":
        return ""
    given = header.get("given")
    is_name = isinstance(given, str) and CODEC_NAME.fullmatch(given)
    return f"{ALLOWED_FORMATS} (this clip's codec is {given})" if is_name else ALLOWED_FORMATS


def _num_spans(sampling: FrameSampling, limits: MediaLimits) -> int:
    """How many times a clip may take the time for SPAN_FRAMES. It is known before anything is read from the clip."""
    most = sampling.num_frames if sampling.fps is None else sampling.max_frames
    return max(1, -(-min(most, limits.max_sampled_frames) // SPAN_FRAMES))


def _request(sampling: FrameSampling, limits: MediaLimits) -> dict[str, Any]:
    spans = _num_spans(sampling, limits)
    request = {
        "num_frames": sampling.num_frames,
        "fps": sampling.fps,
        # One more than the limit, so that a clip that needs more frames is refused and not sampled with fewer.
        "max_frames": min(sampling.max_frames, limits.max_sampled_frames + 1),
        "max_pixels": limits.max_pixels,
        "max_decoded_frames": limits.max_decoded_frames,
    }
    bounds = {
        "wall_s": limits.decode_wall_s * spans,
        "cpu_s": limits.decode_cpu_s * spans,
        "memory_bytes": limits.decode_memory_bytes,
    }
    return {"request": request, "limits": bounds}
