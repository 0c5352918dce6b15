"""Clips to their sampled frames, decoded in a child process: whole (`decode_video`) or chunk by chunk (`open_clip`)."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np

from mm.data.media import FrameSampling, Pixels, Video
from mm.errors import EngineError, InvalidRequest, MediaError
from mm.media.child_pool import POOL, ChildPool
from mm.media.clip_reader import ALLOWED_FORMATS, ClipReader
from mm.media.containers import foreign_name, is_cut_short, sniff
from mm.media.hashing import content_hash, pixel_hash
from mm.media.limits import MediaBudget

log = logging.getLogger(__name__)


def prepare_decoder() -> None:
    """Check that the decoder is installed, and start a spare child, so that the first clip need not wait.

    Raises:
        EngineError: It is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise EngineError("PyAV, which decodes clips, is not installed: pip install 'mm-serving[models]'")
    POOL.refill()


def decode_video(data: bytes, sampling: FrameSampling, budget: MediaBudget, pool: ChildPool | None = None) -> Video:
    """Sample frames of a clip by their presentation times.

    The clip's duration is cut into `num_frames` equal spans, or with `fps` into round(duration x fps) spans. The frame
    on screen at the centre of each span is sampled. All frames are different, and a shorter clip gives all it has.

    Times and duration come from the frames that a player shows, and never from a header. Time 0 is the first of these
    frames. The display matrix is applied, transparent parts are white, and pixels are treated as square. If the size
    changes within the clip, all frames are scaled to that of the first.

    Frames that cannot be decoded are left out, and the other ones are given. `Video.num_damaged` counts what is broken.

    Args:
        pool: Where the child comes from. By default the pool of this process.

    Raises:
        InvalidRequest: The sampling asks for no frames.
        MediaError: `empty`, `no_video`, `unsupported_format`, `undecodable`, `decode_limit`, or a limit of the budget.
        EngineError: The child does not start.
    """
    with _opened(data, sampling, budget, pool) as clip:
        budget.take_pixels("video", clip.width, clip.height, clip.num_frames)
        frames = np.empty((clip.num_frames, clip.height, clip.width, 3), np.uint8)
        times_s: list[float] = []
        for chunk in clip.chunks(1):
            frames[len(times_s)] = chunk.frames[0]
            times_s += chunk.timestamps_s
    if clip.num_damaged:
        log.warning("damaged_clip num_damaged=%d num_frames=%d", clip.num_damaged, len(times_s))
    return Video(
        frames=frames[: len(times_s)],
        timestamps_s=tuple(times_s),
        duration_s=clip.duration_s,
        content_hash=content_hash("video", data, sampling),
        num_damaged=clip.num_damaged,
    )


@contextmanager
def open_clip(
    data: bytes, sampling: FrameSampling, budget: MediaBudget, *, chunk_frames: int = 16, pool: ChildPool | None = None
) -> Generator[ClipReader]:
    """Sample a clip of any length chunk by chunk, in memory that does not depend on its length.

    The frames are those of `decode_video`. `ClipReader.chunks(chunk_frames)` gives them while later ones are still
    decoded. Two chunks are in memory at most: the caller's and the one after it. Only these draw from the pixels of the
    budget. The limits on the duration and on the number of frames hold as for a whole clip. Time that the caller
    spends between two chunks does not count against the time limit. Leaving the context ends the child.

    Args:
        chunk_frames: The largest number of frames of a chunk that the caller will ask for.
        pool: Where the child comes from. By default the pool of this process.

    Raises:
        InvalidRequest, MediaError, EngineError: As `decode_video`; also while chunks are read.
    """
    if chunk_frames < 1:
        raise InvalidRequest(f"chunk_frames must be at least 1, not {chunk_frames}")
    with _opened(data, sampling, budget, pool) as clip:
        budget.take_pixels("video", clip.width, clip.height, min(clip.num_frames, 2 * chunk_frames))
        clip.max_chunk_frames = chunk_frames
        yield clip


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


@contextmanager
def _opened(data: bytes, sampling: FrameSampling, budget: MediaBudget, pool: ChildPool | None) -> Generator[ClipReader]:
    """A reader whose plan was drawn from the budget, except for the pixels."""
    _check_sampling(sampling, budget)
    _check_container(data)
    clip = ClipReader((pool or POOL).take(), data, sampling, budget)
    try:
        clip.begin()
        yield clip
    finally:
        clip.close()


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
    if container is None and (name := foreign_name(data)):
        raise MediaError("unsupported_format", "video", allowed=f"{ALLOWED_FORMATS} (this is {name})")
    if container is None or is_cut_short(data, container):
        raise MediaError("undecodable", "video")
