"""The decoders that run inside the video child: bytes to a plan and then frames, one at a time.

Each is a generator `(data, ask) -> Plan, Frame, Frame, ...`, so that only one frame is held here, and the parent can
refuse the plan before anything is decoded. Imported in the child only; a decoder's library is imported when it is
opened by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mm.media.sample import choose, num_wanted

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif"})


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the parent wants: the sampling, and the limits only a decoder can keep."""

    num_frames: int
    fps: float | None
    max_frames: int
    max_pixels: int
    max_decoded_frames: int


class Plan(NamedTuple):
    """What will be decoded. The size is the coded one; a rotated clip's frames have the sides exchanged."""

    width: int
    height: int
    num_frames: int
    duration_s: float


class Frame(NamedTuple):
    """One frame: its time from the clip's start, and uint8 RGB (H, W, 3)."""

    time_s: float
    pixels: np.ndarray


class Refused(Exception):
    """The clip cannot be used: a key of `MEDIA_REASONS`, and the limit if it has one."""

    def __init__(self, reason: str, limit: float | None = None) -> None:
        super().__init__(reason, limit)
        self.reason, self.limit = reason, limit


Decode = Callable[[bytes, Ask], Iterator[Plan | Frame]]


def open_pyav() -> Decode:
    """PyAV: own FFmpeg of current date, true times, no crash in 4,000 damaged clips. The default."""
    import av
    import av.logging

    av.logging.set_level(None)
    # PyAV imports parts of itself when a stream of their kind turns up; in the confined child that would fail.
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)
    return decode_pyav


def open_decord() -> Decode:
    """decord: an FFmpeg of 2019 that crashes on some damaged clips. Only for files the operator trusts."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decode_decord


DECODERS: dict[str, Callable[[], Decode]] = {"pyav": open_pyav, "decord": open_decord}


@dataclass(frozen=True)
class Packet:
    """A compressed frame's place in the file: its time stamp in units of the stream, and where decoding may start."""

    stamp: int
    duration: int
    is_keyframe: bool


def decode_pyav(data: bytes, ask: Ask) -> Iterator[Plan | Frame]:
    """A first pass reads packets only and fixes the frames.

    A second one decodes just the stretches that lead to them.
    """
    with _opened(data) as container:
        stream = _video_stream(container, ask)
        packets = _packets(container, stream)
        base, size = float(stream.time_base), (stream.codec_context.width, stream.codec_context.height)
        # AVI has no presentation times: its frames come out in order of time and are counted instead.
        is_counted = container.format.name == "avi"
    stamps = sorted({packet.stamp for packet in packets})
    duration_s = (_end(packets, stamps) - stamps[0]) * base
    times_s = [(stamp - stamps[0]) * base for stamp in stamps]
    chosen = choose(times_s, duration_s, num_wanted(len(stamps), duration_s, ask.num_frames, ask.fps, ask.max_frames))
    yield Plan(*size, len(chosen), duration_s)
    if is_counted:
        yield from _decode_counted(data, ask, [(index, times_s[index]) for index in chosen])
    else:
        yield from _decode_stamped(data, ask, packets, [stamps[index] for index in chosen], stamps[0], base)


def _opened(data: bytes) -> Any:
    import av

    options = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
    return av.open(BytesIO(data), options=options, metadata_errors="replace", buffer_size=1 << 18)


def _video_stream(container: Any, ask: Ask) -> Any:
    stream = container.streams.video[0]
    if stream.codec_context.name not in CODECS:
        raise Refused("unsupported_format")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {
        "max_pixels": str(ask.max_pixels)
    }  # a later frame may be larger than the header says
    return stream


def _packets(container: Any, stream: Any) -> list[Packet]:
    packets = []
    for packet in container.demux(stream):
        stamp = packet.dts if packet.pts is None else packet.pts
        if packet.size and stamp is not None:  # the last, empty one only tells the decoder to finish
            # Discarded ones (cut off by an edit list) are decoded for others' sake and never shown.
            packets.append(Packet(stamp, packet.duration or 0, packet.is_keyframe and not packet.is_discard))
    if not packets or 0 < stream.frames > len(packets):
        raise Refused("undecodable")
    return packets


def _end(packets: list[Packet], stamps: list[int]) -> int:
    """End of the last frame; where its duration is not told, it is taken as the shortest gap between frames."""
    last = max(packets, key=lambda packet: packet.stamp)
    gap = min((b - a for a, b in pairwise(stamps)), default=1)
    return last.stamp + (last.duration or gap)


def _decode_stamped(
    data: bytes, ask: Ask, packets: list[Packet], wanted: list[int], first_stamp: int, base: float
) -> Iterator[Frame]:
    """Decode from the key frame before each wanted stamp until that stamp comes out; skip the packets in between."""
    starts = [_start(packets, stamp) for stamp in wanted]
    position, num_decoded, is_fresh = 0, 0, True
    with _opened(data) as container:
        stream = _video_stream(container, ask)
        for index, packet in enumerate(_fed(container, stream)):
            if position == len(wanted):
                return
            if index < starts[position] and packet.size:
                is_fresh = False
                continue
            if not is_fresh:
                stream.codec_context.flush_buffers()
                is_fresh = True
            for frame in packet.decode():
                num_decoded = _count(num_decoded, ask)
                if position < len(wanted) and frame.pts is not None and frame.pts >= wanted[position]:
                    yield Frame((frame.pts - first_stamp) * base, _pixels(frame))
                    position += 1
    if position < len(wanted):
        raise Refused("undecodable")


def _decode_counted(data: bytes, ask: Ask, wanted: list[tuple[int, float]]) -> Iterator[Frame]:
    """Decode from the start and pick frames by their number."""
    position = num_decoded = 0
    with _opened(data) as container:
        for index, frame in enumerate(container.decode(_video_stream(container, ask))):
            num_decoded = _count(num_decoded, ask)
            if index == wanted[position][0]:
                yield Frame(wanted[position][1], _pixels(frame))
                position += 1
            if position == len(wanted):
                return
    raise Refused("undecodable")


def _fed(container: Any, stream: Any) -> Iterator[Any]:
    """The packets that `_packets` counted, in the same order, and the empty last one."""
    return (p for p in container.demux(stream) if not p.size or p.pts is not None or p.dts is not None)


def _start(packets: list[Packet], stamp: int) -> int:
    """Index of the last key frame that comes before `stamp` in the file and in time."""
    start = 0
    for index, packet in enumerate(packets):
        if packet.is_keyframe and packet.stamp <= stamp:
            start = index
        if packet.stamp == stamp:
            break
    return start


def _count(num_decoded: int, ask: Ask) -> int:
    if num_decoded >= ask.max_decoded_frames:
        raise Refused("too_many_frames", ask.max_decoded_frames)
    return num_decoded + 1


def _pixels(frame: Any) -> np.ndarray:
    """uint8 RGB (H, W, 3), upright, transparent parts white."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    # rotation: degrees counter-clockwise that the player has to turn the stored frame.
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))


def decode_decord(data: bytes, ask: Ask) -> Iterator[Plan | Frame]:
    """It seeks by itself, so `max_decoded_frames` bounds the clip's frames, and one is decoded before the plan."""
    import decord

    reader = decord.VideoReader(BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    if len(reader) > ask.max_decoded_frames:
        raise Refused("too_many_frames", ask.max_decoded_frames)
    shown = reader.get_frame_timestamp(list(range(len(reader)))).astype(float)  # (T, 2): begin and end of each
    times_s = [float(begin) for begin in shown[:, 0] - shown[0, 0]]
    duration_s = float(shown[:, 1].max() - shown[0, 0])
    chosen = choose(times_s, duration_s, num_wanted(len(times_s), duration_s, ask.num_frames, ask.fps, ask.max_frames))
    height, width, _ = reader[0].shape
    yield Plan(width, height, len(chosen), duration_s)
    for index in chosen:
        yield Frame(times_s[index], reader[index].asnumpy())
