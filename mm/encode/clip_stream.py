"""Clips chunk by chunk: decoded, encoded and reduced while later frames are still to come.

Where the tower sees frames apart and the reducer takes them in chunks (`Streams`), a clip of any length needs the
memory of a few chunks. What the reducer has settled is reported as it goes, so that the decoder may begin with it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from mm.data.media import FrameChunk, MediaFile, Video
from mm.data.tokens import Cube, Encoded, EncodedMedia, EncodeTimings, VisualTokens
from mm.encode.loaded import LoadedItem, LoadedMedia
from mm.encode.parts import EncodeParts, call_encoder
from mm.errors import MediaError, ReducerFault
from mm.media import open_clip
from mm.plugins.capabilities import streams
from mm.plugins.reducer import FrameStream, Reducer, Settles, Streams
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors

log = logging.getLogger(__name__)

STREAMED_FRAMES = 16
"""Frames of a chunk. The tower's memory is that of so many."""


@dataclass(frozen=True, kw_only=True)
class ClipProgress:
    """How far the clip of a request is.

    Attributes:
        num_frames: Frames that are encoded.
        total_frames: Frames that were asked for. A damaged clip has fewer in the end.
        settled: The encoded clip as far as no later frame changes it, where that is more than was reported before. Its
            tokens are the first ones of the whole clip's.
    """

    num_frames: int
    total_frames: int
    settled: EncodedMedia | None = None


OnProgress = Callable[[ClipProgress], None]
"""Told after each chunk, in the thread that encodes. What it raises ends the request."""


@dataclass(frozen=True, kw_only=True)
class ClipTimes:
    """When the frames of a clip are shown.

    Attributes:
        timestamps_s: Of each frame.
        duration_s: Of the clip.
    """

    timestamps_s: tuple[float, ...]
    duration_s: float


def takes_files(reducer: Reducer, parts: EncodeParts) -> bool:
    """Whether clips need not be decoded before they are encoded."""
    return streams(reducer) is not None and bool(getattr(parts.encoder, "frames_apart", False))


def encode_streams(
    items: Iterable[LoadedItem], loaded: LoadedMedia, parts: EncodeParts, on_progress: OnProgress | None
) -> dict[str, Encoded]:
    """The clips among the items that can be taken chunk by chunk, encoded and cached, by key.

    Where the reducer fails and the policy keeps all tokens then, a clip is left out.

    Raises:
        MediaError: A clip cannot be used; names the request field.
        ReducerFault: The reducer failed, and the policy's `on_error` is "fail".
    """
    reducer, done = streams(loaded.reducer.plugin), dict[str, Encoded]()
    if reducer is None or not takes_files(loaded.reducer.plugin, parts):
        return done
    for item in items:
        if not isinstance(item.content, MediaFile | Video) or not _is_clip(item.content):
            continue
        try:
            encoded = _encode_stream(item, reducer, loaded, parts, on_progress)
        except ReducerFault as error:
            if parts.policy.on_error == "fail":
                raise
            log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
            continue
        done[item.key] = encoded
        parts.cache.put(item.key, replace(encoded, timings=EncodeTimings()))
    return done


def _is_clip(content: MediaFile | Video) -> bool:
    return content.kind == "video" if isinstance(content, MediaFile) else len(content.frames) > 0


def _encode_stream(
    item: LoadedItem, reducer: Streams, loaded: LoadedMedia, parts: EncodeParts, on_progress: OnProgress | None
) -> Encoded:
    start, waited_s, times, reported = time.perf_counter(), 0.0, list[float](), 0
    with _chunks(item.content, loaded) as (chunks, duration_s, total):
        with plugin_errors(name_of(reducer), "on the frames of a clip"):
            stream = reducer.stream()
        while True:
            asked = time.perf_counter()
            if (chunk := next(chunks, None)) is None:
                break
            waited_s += time.perf_counter() - asked
            times += chunk.timestamps_s
            _add(stream, chunk, duration_s, reducer, parts)
            if on_progress is not None:
                settled = _settled(stream, reducer, reported)
                reported = settled.num_tokens if settled else reported
                media = (
                    None
                    if settled is None
                    else EncodedMedia(items=(Encoded(tokens=settled, key=item.key),), reducer=loaded.reducer.canonical)
                )
                on_progress(ClipProgress(num_frames=len(times), total_frames=total, settled=media))
        with plugin_errors(name_of(reducer), "on the frames of a clip"):
            tokens = stream.finish()
    timings = EncodeTimings(load_s=item.load_s + waited_s, encode_s=time.perf_counter() - start - waited_s)
    shown = ClipTimes(timestamps_s=tuple(times), duration_s=duration_s)
    return Encoded(tokens=tokens, timings=timings, key=item.key, cubes=cubes_of(tokens, shown))


@contextmanager
def _chunks(content: object, loaded: LoadedMedia) -> Generator[tuple[Iterator[FrameChunk], float, int]]:
    """The frames of a file or a clip in memory, the clip's duration, and how many frames will come."""
    if isinstance(content, Video):
        yield iter(_split(content)), content.duration_s, len(content.frames)
        return
    assert isinstance(content, MediaFile)
    try:
        with open_clip(content.data, loaded.frames, loaded.budget, chunk_frames=STREAMED_FRAMES) as clip:
            yield clip.chunks(STREAMED_FRAMES), clip.duration_s, clip.num_frames
            if clip.num_damaged:
                log.warning("damaged_clip num_damaged=%d num_frames=%d", clip.num_damaged, clip.num_frames)
    except MediaError as error:
        raise error.at(content.param) if content.param else error from None


def _split(clip: Video) -> Iterator[FrameChunk]:
    for first in range(0, len(clip.frames), STREAMED_FRAMES):
        part = slice(first, first + STREAMED_FRAMES)
        yield FrameChunk(frames=clip.frames[part], timestamps_s=clip.timestamps_s[part], first=first)


def _add(stream: FrameStream, chunk: FrameChunk, duration_s: float, reducer: Streams, parts: EncodeParts) -> None:
    frames = np.ascontiguousarray(chunk.frames)
    clip = Video(frames=frames, timestamps_s=chunk.timestamps_s, duration_s=duration_s, content_hash="")
    (tokens,) = call_encoder(parts, functools.partial(parts.encoder.encode, [clip], needs=reducer.needs))
    with plugin_errors(name_of(reducer), "on the frames of a clip"):
        stream.add(tokens)


def _settled(stream: FrameStream, reducer: Streams, reported: int) -> VisualTokens | None:
    """What is certain, if it is more than `reported` tokens."""
    if not isinstance(stream, Settles):
        return None
    with plugin_errors(name_of(reducer), "when asked for what is settled"):
        tokens = stream.settled()
    return tokens if tokens is not None and tokens.num_tokens > reported else None


def cubes_of(tokens: VisualTokens, clip: ClipTimes | Video) -> tuple[Cube, ...]:
    """The pieces into which a reducer cut a clip, with their times; none where it did not cut."""
    if not tokens.borders:
        return ()
    num_frames = tokens.grid[0]
    ends = [*tokens.borders[1:], num_frames]
    times = [*clip.timestamps_s, max(clip.duration_s, clip.timestamps_s[-1])]
    return tuple(
        Cube(first_frame=first, num_frames=end - first, start_s=times[first], end_s=times[end])
        for first, end in zip(tokens.borders, ends, strict=True)
    )
