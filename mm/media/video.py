"""Clips to `Video`, decoded in a child process that can be killed.

A child decodes one clip. A spare child is kept that has imported its decoder, so a request need not wait for an
interpreter to start (about 0.2 s). When it is taken, the next spare is started. A child ends when its pipe is closed,
so it cannot outlive this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mm.config import MediaLimits, VideoDecoder
from mm.data.media import FrameSampling, Pixels, Video
from mm.errors import MEDIA_REASONS, EngineError, InvalidRequest, MediaError
from mm.media.containers import is_cut_short, is_foreign, sniff
from mm.media.hashing import content_hash, pixel_hash
from mm.media.limits import MediaBudget
from mm.media.wire import OUT_OF_MEMORY_STATUS, WireClosed, read_header, write_message

ALLOWED_FORMATS = "MP4, MOV, WebM, MKV, AVI or GIF with H.264, H.265, VP8, VP9, AV1, MPEG-4 or MJPEG"
CHILD_COMMAND = (sys.executable, "-m", "mm.media.video_child")
START_TIMEOUT_S = 60.0
LIMIT_STATUSES = frozenset({-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGALRM, OUT_OF_MEMORY_STATUS})
MODULES = {"pyav": "av", "decord": "decord"}


class Child:
    """A running video child and its pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_child_environment(),
            start_new_session=True,  # a process group of its own, which can be killed as a whole
        )
        self.pipe_in, self.pipe_out = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        self.hit_deadline = False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the child and everything it started. Safe to call from another thread, and again."""
        # The child is not reaped yet, so its id is its own. `deadline` ends its timer before `close` is called.
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Kill and reap the child, close the pipes. Returns the exit status, which is negative for a signal."""
        self.kill()
        status = self.process.wait()
        for pipe in (self.pipe_in, self.pipe_out):
            try:
                pipe.close()
            except OSError:  # there are unsent bytes, and the child is gone
                continue
        return status

    @contextmanager
    def deadline(self, seconds: float) -> Generator[None]:
        """Kill the child when the time is over. This also ends a blocked read from it or write to it."""
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        self.hit_deadline = True
        self.kill()


class ChildPool:
    """Starts children and keeps one spare per decoder. Thread-safe.

    Args:
        command: The command that starts a child. The decoder's name is appended.
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._spares: dict[str, Child] = {}

    def take(self, decoder: str) -> Child:
        """A child that has not decoded anything yet. The caller closes it. The next spare starts meanwhile."""
        with self._lock:
            spare, self._spares[decoder] = self._spares.get(decoder), self._start(decoder)
        if spare is not None and spare.is_alive:
            return spare
        if spare is not None:
            spare.close()
        return self._start(decoder)

    def refill(self, decoder: str) -> None:
        """Start a spare if there is none."""
        with self._lock:
            if decoder not in self._spares:
                self._spares[decoder] = self._start(decoder)

    def _start(self, decoder: str) -> Child:
        return Child((*self._command, decoder))

    def close(self) -> None:
        """End the spares."""
        with self._lock:
            spares, self._spares = list(self._spares.values()), {}
        for spare in spares:
            spare.close()

    def forget(self) -> None:
        """Drop the spares without ending them. After a fork they belong to the parent process."""
        self._lock = threading.Lock()
        self._spares = {}


_POOL = ChildPool()
atexit.register(_POOL.close)
os.register_at_fork(after_in_child=_POOL.forget)


def prepare_decoder(decoder: VideoDecoder = "pyav") -> None:
    """Check that a decoder is installed, and start its spare, so that the first clip need not wait.

    Raises:
        EngineError: It is not installed.
    """
    if importlib.util.find_spec(MODULES[decoder]) is None:
        extra = "decord" if decoder == "decord" else "models"
        raise EngineError(f"the video decoder {decoder!r} is not installed: pip install 'mm-serving[{extra}]'")
    _POOL.refill(decoder)


def decode_video(
    data: bytes, sampling: FrameSampling, budget: MediaBudget, decoder: str = "pyav", pool: ChildPool | None = None
) -> Video:
    """Sample frames of a clip by their presentation times. Rotation is applied. Pixels are treated as square.

    The clip's duration is cut into `num_frames` equal spans, or with `fps` into round(duration x fps) spans. The frame
    on screen at the centre of each span is sampled. All frames are different, and a shorter clip gives all it has.

    Args:
        decoder: "pyav" or "decord".
        pool: Where the child comes from. By default the pool of this process.

    Raises:
        InvalidRequest: The sampling asks for no frames.
        MediaError: `empty`, `unsupported_format`, `undecodable`, `decode_limit`, or a limit of the budget.
        EngineError: The child does not start.
    """
    _check_sampling(sampling, budget)
    _check_container(data)
    pool = pool or _POOL
    child = pool.take(decoder)
    status = 0
    try:
        frames, times_s, duration_s = _converse(child, data, sampling, budget)
    except (WireClosed, BrokenPipeError):
        status = child.close()
        raise MediaError(_reason_of_death(child, status), "video") from None
    finally:
        child.close()
    name = content_hash("video", data, sampling, decoder)
    return Video(frames=frames, timestamps_s=times_s, duration_s=duration_s, content_hash=name)


def video_from_array(frames: Pixels, timestamps_s: Sequence[float], duration_s: float, budget: MediaBudget) -> Video:
    """A clip from uint8 RGB frames (T, H, W, 3) in memory, with their ascending times in seconds.

    The array is copied.

    Raises:
        InvalidRequest: Another dtype or shape, or times that do not fit.
        MediaError: A limit of the budget.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise InvalidRequest(
            f"frames must be uint8 of shape (T, H, W, 3) with T > 0, not {frames.dtype} {frames.shape}"
        )
    times_s = tuple(float(time_s) for time_s in timestamps_s)
    if len(times_s) != len(frames) or list(times_s) != sorted(times_s) or not times_s[-1] <= duration_s:
        raise InvalidRequest(f"{len(frames)} frames need as many ascending timestamps_s, none after duration_s")
    draw_video(frames, duration_s, budget)
    copy = np.array(frames, order="C")
    name = pixel_hash("video", copy, (*times_s, float(duration_s)))
    return Video(frames=copy, timestamps_s=times_s, duration_s=float(duration_s), content_hash=name)


def draw_video(frames: Pixels, duration_s: float, budget: MediaBudget) -> None:
    """Draw a clip whose frames are in memory already.

    Raises:
        MediaError: A limit of the budget.
    """
    budget.take_item("video")
    budget.take_duration(duration_s)
    budget.take_frames(len(frames))
    budget.take_pixels("video", frames.shape[2], frames.shape[1], len(frames))


def _check_sampling(sampling: FrameSampling, budget: MediaBudget) -> None:
    if sampling.fps is not None and not (math.isfinite(sampling.fps) and sampling.fps > 0):
        raise InvalidRequest(f"fps must be a positive number, not {sampling.fps}")
    if (sampling.num_frames if sampling.fps is None else sampling.max_frames) < 1:
        raise InvalidRequest("at least 1 frame of a clip has to be sampled")
    if sampling.fps is None:
        budget.take_frames(sampling.num_frames)


def _check_container(data: bytes) -> None:
    if not data:
        raise MediaError("empty", "video")
    container = sniff(data)
    if container is None and is_foreign(data):
        raise MediaError("unsupported_format", "video", allowed=ALLOWED_FORMATS)
    if container is None or is_cut_short(data, container):
        raise MediaError("undecodable", "video")


Decoded = tuple[Pixels, tuple[float, ...], float]
"""Frames, times and duration, as in `Video`."""


def _converse(child: Child, data: bytes, sampling: FrameSampling, budget: MediaBudget) -> Decoded:
    """Send the clip to the child and receive its frames. Every message is checked: the clip may control the child."""
    _await_ready(child)
    with child.deadline(budget.limits.decode_wall_s):
        write_message(child.pipe_in, _request(sampling, budget.limits), data)
        plan = _next(child, "plan")
        width, height, num_frames, duration_s = _draw(plan, sampling, budget)
        frames: Pixels | None = None
        times_s: list[float] = []
        for index in range(num_frames):
            header = _next(child, "frame")
            shape = (int(header["height"]), int(header["width"]), 3)
            if frames is None and sorted(shape[:2]) == sorted((height, width)):
                frames = np.empty((num_frames, *shape), np.uint8)
            if frames is None or shape != frames.shape[1:] or header["num_bytes"] != frames[0].nbytes:
                raise MediaError("undecodable", "video")
            _read_into(child.pipe_out, frames[index])
            times_s.append(float(header["time_s"]))
        _next(child, "done")
    assert frames is not None, "a plan has at least one frame"
    return frames, tuple(times_s), duration_s


def _await_ready(child: Child) -> None:
    try:
        with child.deadline(START_TIMEOUT_S):
            _next(child, "ready")
    except (WireClosed, MediaError):
        raise EngineError(f"the video child does not start (status {child.close()})") from None


def _request(sampling: FrameSampling, limits: MediaLimits) -> dict[str, Any]:
    request = {
        "num_frames": sampling.num_frames,
        "fps": sampling.fps,
        # One more than the limit, so that a clip that needs more frames is refused and not sampled with fewer.
        "max_frames": min(sampling.max_frames, limits.max_sampled_frames + 1),
        "max_pixels": limits.max_pixels,
        "max_decoded_frames": limits.max_decoded_frames,
    }
    bounds = {
        "wall_s": limits.decode_wall_s,
        "cpu_s": limits.decode_cpu_s,
        "memory_bytes": limits.decode_memory_bytes,
    }
    return {"request": request, "limits": bounds}


def _next(child: Child, expected: str) -> dict[str, Any]:
    """The next message's header.

    Raises:
        MediaError: The child refuses the clip, or sends another message than expected.
        WireClosed: It ended.
    """
    header = read_header(child.pipe_out)
    if header.get("type") == "refused" and header.get("reason") in MEDIA_REASONS:
        allowed = ALLOWED_FORMATS if header["reason"] == "unsupported_format" else ""
        raise MediaError(header["reason"], "video", header.get("limit"), allowed)
    if header.get("type") != expected:
        raise MediaError("undecodable", "video")
    return header


def _draw(plan: dict[str, Any], sampling: FrameSampling, budget: MediaBudget) -> tuple[int, int, int, float]:
    """The plan, after it was drawn from the budget. The child has not decoded anything yet."""
    width, height, num_frames = (int(plan[name]) for name in ("width", "height", "num_frames"))
    duration_s = float(plan["duration_s"])
    wanted = sampling.num_frames if sampling.fps is None else sampling.max_frames
    if not 1 <= num_frames <= wanted or not duration_s >= 0:
        raise MediaError("undecodable", "video")
    budget.take_duration(duration_s)
    budget.take_frames(num_frames)
    budget.take_pixels("video", width, height, num_frames)
    return width, height, num_frames, duration_s


def _read_into(pipe: BinaryIO, frame: Pixels) -> None:
    """Fill one frame (H, W, 3) directly from the pipe."""
    view = frame.data.cast("B")
    if cast(Any, pipe).readinto(view) != len(view):
        raise WireClosed


def _reason_of_death(child: Child, status: int) -> str:
    return "decode_limit" if child.hit_deadline or status in LIMIT_STATUSES else "undecodable"


def _child_environment() -> dict[str, str]:
    """The variables that Python needs to find the same packages, and no others, since they may hold secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    root = str(Path(__file__).parents[2])
    # The thread pool of a math library would reserve memory, which counts towards the limit.
    return {**kept, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), "OPENBLAS_NUM_THREADS": "1"}
