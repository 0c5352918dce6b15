"""The decoders that run inside the video child: the bytes of a clip to a plan and then to frames.

Each decoder is a generator `(data, request) -> Plan, Frame, Frame, ...`. So only one frame is held in memory, and the
parent can refuse the plan before anything is decoded. This file is imported in the child only. The library of a decoder
is imported when the decoder is opened.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mm.media.sample import choose, num_wanted

if TYPE_CHECKING:
    from mm.data.media import Pixels

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif"})


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


class Plan(NamedTuple):
    """What will be decoded. The size is the coded one. The frames of a rotated clip have width and height exchanged."""

    width: int
    height: int
    num_frames: int
    duration_s: float


class Frame(NamedTuple):
    """One frame: its time from the clip's start in seconds, and uint8 RGB (H, W, 3)."""

    time_s: float
    pixels: Pixels


class Refused(Exception):
    """The clip cannot be used. Carries a key of `MEDIA_REASONS`, and the limit if the reason has one."""

    def __init__(self, reason: str, limit: float | None = None) -> None:
        super().__init__(reason, limit)
        self.reason, self.limit = reason, limit


Decode = Callable[[bytes, DecodeRequest], Iterator[Plan | Frame]]


def open_pyav() -> Decode:
    """PyAV, the default: it brings a current FFmpeg, gives exact times, and survived 4,000 damaged clips in tests."""
    import av
    import av.logging

    av.logging.set_level(None)
    # PyAV imports some modules only when a stream needs them. The limited child can no longer import.
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)
    return decode_pyav


def open_decord() -> Decode:
    """decord, for trusted files only: it brings an FFmpeg of 2019 that crashes on some damaged clips."""
    decord: Any = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    return decode_decord


DECODERS: dict[str, Callable[[], Decode]] = {"pyav": open_pyav, "decord": open_decord}


@dataclass(frozen=True)
class Packet:
    """A compressed frame: its time stamp and duration in units of the stream, and whether decoding may start at it."""

    stamp: int
    duration: int
    is_keyframe: bool


def decode_pyav(data: bytes, request: DecodeRequest) -> Iterator[Plan | Frame]:
    """Read all packets once to choose the frames, then decode only the packets that are needed for them."""
    with _opened(data) as container:
        stream = _video_stream(container, request)
        packets = _packets(container, stream)
        base, size = float(stream.time_base), (stream.codec_context.width, stream.codec_context.height)
        # AVI has no presentation times. Its frames are decoded in order of time, so they are counted instead.
        is_counted = container.format.name == "avi"
    stamps = sorted({packet.stamp for packet in packets})
    duration_s = (_end(packets, stamps) - stamps[0]) * base
    times_s = [(stamp - stamps[0]) * base for stamp in stamps]
    chosen = choose(times_s, duration_s, request.num_wanted(len(stamps), duration_s))
    yield Plan(*size, len(chosen), duration_s)
    if is_counted:
        yield from _decode_counted(data, request, [(index, times_s[index]) for index in chosen])
    else:
        yield from _decode_stamped(data, request, packets, [stamps[index] for index in chosen], stamps[0], base)


def _opened(data: bytes) -> Any:
    import av

    options = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
    return av.open(BytesIO(data), options=options, metadata_errors="replace", buffer_size=1 << 18)


def _video_stream(container: Any, request: DecodeRequest) -> Any:
    stream = container.streams.video[0]
    if stream.codec_context.name not in CODECS:
        raise Refused("unsupported_format")
    stream.codec_context.thread_count = 1
    # The header's size was checked, but a later frame may be larger.
    stream.codec_context.options = {"max_pixels": str(request.max_pixels)}
    return stream


def _packets(container: Any, stream: Any) -> list[Packet]:
    packets: list[Packet] = []
    for packet in container.demux(stream):
        stamp = packet.dts if packet.pts is None else packet.pts
        if packet.size and stamp is not None:  # the last packet is empty and ends the stream
            # Discarded frames (cut off by an edit list) are only decoded because other frames need them.
            packets.append(Packet(stamp, packet.duration or 0, packet.is_keyframe and not packet.is_discard))
    if not packets or 0 < stream.frames > len(packets):
        raise Refused("undecodable")
    return packets


def _end(packets: list[Packet], stamps: list[int]) -> int:
    """End of the last frame. If its duration is unknown, the shortest gap between two frames is used."""
    last = max(packets, key=lambda packet: packet.stamp)
    gap = min((b - a for a, b in pairwise(stamps)), default=1)
    return last.stamp + (last.duration or gap)


def _decode_stamped(
    data: bytes, request: DecodeRequest, packets: list[Packet], wanted: list[int], first_stamp: int, base: float
) -> Iterator[Frame]:
    """For each wanted stamp, decode from the last key frame before it until its frame is there. Skip other packets."""
    starts = [_start(packets, stamp) for stamp in wanted]
    position, num_decoded, is_fresh = 0, 0, True
    with _opened(data) as container:
        stream = _video_stream(container, request)
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
                num_decoded = _count(num_decoded, request)
                if position < len(wanted) and frame.pts is not None and frame.pts >= wanted[position]:
                    yield Frame((frame.pts - first_stamp) * base, _pixels(frame))
                    position += 1
    if position < len(wanted):
        raise Refused("undecodable")


def _decode_counted(data: bytes, request: DecodeRequest, wanted: list[tuple[int, float]]) -> Iterator[Frame]:
    """Decode from the start, and select frames by their number.

    Args:
        wanted: Number and time of each frame, ascending.
    """
    position = num_decoded = 0
    with _opened(data) as container:
        for index, frame in enumerate(container.decode(_video_stream(container, request))):
            num_decoded = _count(num_decoded, request)
            if index == wanted[position][0]:
                yield Frame(wanted[position][1], _pixels(frame))
                position += 1
            if position == len(wanted):
                return
    raise Refused("undecodable")


def _fed(container: Any, stream: Any) -> Iterator[Any]:
    """The packets that `_packets` returns, in the same order, and the empty last one."""
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


def _count(num_decoded: int, request: DecodeRequest) -> int:
    if num_decoded >= request.max_decoded_frames:
        raise Refused("too_many_frames", request.max_decoded_frames)
    return num_decoded + 1


def _pixels(frame: Any) -> Pixels:
    """uint8 RGB (H, W, 3), upright, transparent parts white."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    # rotation: degrees counter-clockwise by which a player has to turn the stored frame.
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))


def decode_decord(data: bytes, request: DecodeRequest) -> Iterator[Plan | Frame]:
    """decord seeks by itself, so `max_decoded_frames` limits the frames of the clip. One is decoded before the plan."""
    decord: Any = importlib.import_module("decord")
    reader = decord.VideoReader(BytesIO(data), ctx=decord.cpu(0), num_threads=1)
    if len(reader) > request.max_decoded_frames:
        raise Refused("too_many_frames", request.max_decoded_frames)
    shown = reader.get_frame_timestamp(list(range(len(reader)))).astype(float)  # (T, 2): start and end of each frame
    times_s = [float(begin) for begin in shown[:, 0] - shown[0, 0]]
    duration_s = float(shown[:, 1].max() - shown[0, 0])
    chosen = choose(times_s, duration_s, request.num_wanted(len(times_s), duration_s))
    height, width, _ = reader[0].shape
    yield Plan(width, height, len(chosen), duration_s)
    for index in chosen:
        yield Frame(times_s[index], reader[index].asnumpy())
