"""The decoding that runs inside the video child: the file of a clip to a plan and then to frames.

`decode` is a generator: Plan, Frame, Frame, ..., Done. So only one frame is held in memory. This file is imported in
the child only, and PyAV is imported by `prepare`.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

from mm.media.animated_webp import decode_webp, is_animated_webp
from mm.media.edit_lists import without_gaps
from mm.media.video_messages import DecodeRequest, Done, Frame, Message, Plan, Refused
from mm.media.video_packets import PacketReader, PacketTable, Timeline
from mm.media.video_pixels import Converter

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

T = TypeVar("T")

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf"
CODECS = frozenset(
    (
        *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "theora", "mjpeg", "gif", "apng"),
        *("prores", "dnxhd", "cfhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "qtrle", "png", "jpeg2000", "rawvideo"),
        *("h263", "flv1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "dvvideo"),
    )
)
DEFAULT_STREAM_PIXELS = 5_000_000
"""What the mark "default" of a stream weighs against its size. This is ffmpeg's choice between several streams."""

SKIPPABLE = frozenset({"h264", "mpeg4", "mpeg1video", "mpeg2video"})
"""Codecs in which a frame that is no reference is needed by no other frame at all. Others have temporal layers."""

INTRA_TYPES = (1, 5, 7)
"""I, SI and BI: picture types of frames that need no other frames."""


class FalseKeyFrame(Exception):
    """A packet is marked as a key frame, and decoding cannot start at it."""


class FalseOrder(Exception):
    """The presentation times of the file contradict the order in which the decoder gives the frames."""


def prepare() -> None:
    """Import PyAV whole. It imports some modules only when a stream needs them, and the limited child no longer can."""
    import av
    import av.logging

    av.logging.set_level(None)
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name != "av.__main__":
            importlib.import_module(module.name)
    gc.freeze()  # what exists now is never garbage, and need not be looked at when frames are freed


def decode(file: BinaryIO, request: DecodeRequest) -> Iterator[Message]:
    """Read all packets once to choose the frames, then decode only the packets that are needed for them.

    Raises:
        Refused: The clip cannot be used.
    """
    if is_animated_webp(file):
        yield from decode_webp(file, request)
        return
    clip = Clip(file, request)
    timeline, first = clip.timeline()
    converter = Converter()
    height, width, _ = converter.rgb(first, None).shape
    chosen = request.choose(timeline.times_s, timeline.duration_s)
    yield Plan(width, height, len(chosen), timeline.duration_s)
    for rank, frame in clip.frames(timeline, chosen):
        yield Frame(timeline.times_s[rank], converter.rgb(frame, (width, height)))
    yield Done(clip.num_damaged + clip.num_unread)


class Clip:
    """One clip. Its file is read from the start for each purpose.

    Attributes:
        num_damaged: Packets that could not be decoded, or only in part.
        num_unread: Places in the file that could not be read.
    """

    def __init__(self, file: BinaryIO, request: DecodeRequest) -> None:
        self._file, self._gaps = without_gaps(file)
        self._request = request
        self.num_damaged = self.num_unread = 0

    def timeline(self) -> tuple[Timeline, VideoFrame]:
        """The frames that a player shows, in order, and the first one, which sets the size of all.

        Those before the first that can be decoded do not count. There are such if a recording starts between two key
        frames.

        Raises:
            Refused: There is none, or the format is not supported.
        """
        timeline = self._read_packets()
        for frame in self._decoded(lambda: 0):
            if (rank := timeline.rank(frame.pts)) is not None:
                return timeline.from_rank(rank), frame
        raise Refused("undecodable")

    def _read_packets(self) -> Timeline:
        with self._opened() as container:
            stream = self._stream(container)
            reader = PacketReader(container, stream)
            # AVI has no presentation times. Those that the library gives are guesses.
            self._table = PacketTable(reader, _codec(stream), container.format.name != "avi")
            self._gaps_of_track = self._gaps.get(stream.id, [])
            self._base, self._rate = float(stream.time_base), float(stream.average_rate or 0)
        self.num_unread = reader.num_errors
        if not len(self._table.shown):
            raise Refused("undecodable" if self.num_unread else "empty")
        if not self._table.has_times:
            return self._counted()
        return self._table.timeline(self._base, self._rate, self._gaps_of_track)

    def _counted(self) -> Timeline:
        """The same from the order in which the frames are decoded. It decodes all of them."""
        decoded: list[int] = []
        delay = 0
        for frame in self._decoded(lambda: 0):
            delay = delay if decoded else self._num_fed - 1
            decoded += [] if frame.pts is None else [frame.pts]
        if not decoded:
            raise Refused("undecodable")
        return self._table.counted_timeline(decoded, delay, self._base, self._rate)

    def frames(self, timeline: Timeline, ranks: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames at the given ranks of the time line, each with its true rank; see `Selection`.

        Args:
            ranks: Different ones, ascending.
        """
        from_start = [0] * len(ranks)
        selection: Selection[VideoFrame] = Selection(ranks)
        starts = [self._table.start(int(timeline.indices[rank])) for rank in ranks]
        tries = [(timeline, starts)] if self._table.has_times else []
        for attempt in (*tries, (timeline, from_start)):
            try:
                yield from self._select(*attempt, selection)
                break
            except FalseKeyFrame:  # then no mark is trusted
                continue
            except FalseOrder:  # then no time is trusted
                yield from self._select(self._counted(), from_start, selection)
                break
        yield from selection.rest()

    def _select(
        self, timeline: Timeline, starts: list[int], selection: Selection[VideoFrame]
    ) -> Iterator[tuple[int, VideoFrame]]:
        def next_start() -> int | None:
            return starts[selection.slot] if selection.slot < len(starts) else None

        needed = {int(timeline.indices[rank]) for rank in selection.ranks}
        last = -1
        for frame in self._decoded(next_start, needed):
            rank = timeline.rank(frame.pts)
            if rank is None or not self._is_usable(frame, rank, timeline):
                continue
            if rank < last:
                raise FalseOrder
            last = rank
            yield from selection.offer(rank, frame)
        if last < 0 and self._start > 0 and self._can_restart:
            raise FalseKeyFrame

    @property
    def _can_restart(self) -> bool:
        """Whether the limit lets the clip be decoded from its start. In a longer one, key frame marks are trusted."""
        return len(self._table) <= self._request.max_decoded_frames

    def _is_usable(self, frame: Any, rank: int, timeline: Timeline) -> bool:
        """False for frames before the key frame at which decoding started, which may need earlier ones.

        Raises:
            FalseKeyFrame: Decoding started at a packet that holds no key frame.
        """
        start = self._start
        first = timeline.rank(start)
        if start == 0 or start == self._checked_start or first is None:
            return True
        if rank < first:
            return False
        if self._can_restart and not (frame.pts == start and _is_intra(frame)):
            raise FalseKeyFrame
        self._checked_start = start
        return True

    def _decoded(self, next_start: Callable[[], int | None], needed: set[int] | None = None) -> Iterator[Any]:
        """Decoded frames in the order in which they are shown. The `pts` of each is the index of its packet.

        Args:
            next_start: The packet from which on everything is needed now. Packets before it are skipped. None ends.
            needed: Packets whose frames are needed. Other frames may be left out if no frame needs them. None: all.
        """
        self._start = self._checked_start = self._num_fed = self.num_damaged = 0
        is_fresh = True
        with self._opened() as container:
            stream = self._stream(container)
            decoder = stream.codec_context
            if _codec(stream) not in SKIPPABLE:
                needed = None
            for index, packet in enumerate(PacketReader(container, stream)):
                start = next_start()
                if start is None:
                    return
                if index < start and not packet.has_sidedata("new_extradata"):
                    is_fresh = False
                    continue
                if not is_fresh:
                    decoder.flush_buffers()
                    is_fresh, self._start = True, index
                if self._num_fed >= self._request.max_decoded_frames:
                    raise Refused("too_many_frames", self._request.max_decoded_frames)
                self._num_fed += 1
                packet.pts = packet.dts = index
                if needed is not None:
                    # The packet after a needed one may hold the second field of its frame.
                    decoder.skip_frame = "DEFAULT" if index in needed or index - 1 in needed else "NONREF"
                yield from self._fed(decoder, packet)
            if next_start() is not None:
                yield from self._fed(decoder, None)

    def _fed(self, decoder: Any, packet: Any) -> list[Any]:
        """The frames that the decoder gives for one packet, or at the end for None."""
        from av.error import FFmpegError

        try:
            frames = decoder.decode(packet)
        except MemoryError:
            raise
        except FFmpegError:
            self.num_damaged += 1
            return []
        self.num_damaged += sum(frame.is_corrupt for frame in frames)
        return frames

    def _opened(self) -> Any:
        import av

        options = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
        self._file.seek(0)
        return av.open(self._file, options=options, metadata_errors="replace", buffer_size=1 << 18)

    def _stream(self, container: Any) -> Any:
        """The video stream that ffmpeg takes: no cover picture, else the largest, with a bonus for the default one."""
        streams = [stream for stream in container.streams if stream.type == "video" and not _is_cover(stream)]
        if not streams:
            raise Refused("no_video")
        stream = max(streams, key=_preference)
        if stream.codec_context is None or _codec(stream) not in CODECS:
            raise Refused("unsupported_format", given=_codec(stream) if stream.codec_context else "")
        if stream.codec_context.width * stream.codec_context.height > self._request.max_pixels:
            raise Refused("too_many_pixels", self._request.max_pixels)
        stream.codec_context.thread_count = 1
        # The header's size was checked, but a later frame may be larger.
        stream.codec_context.options = {"max_pixels": str(self._request.max_pixels)}
        return stream


class Selection(Generic[T]):
    """Picks frames by rank while they are decoded.

    The place of a frame that cannot be decoded is taken by the frame that a player shows instead, the one before it, or
    else by the next one. No frame is given twice, so there may be fewer than were asked for.

    Attributes:
        ranks: The selected ranks, ascending.
        slot: Index in `ranks` of the frame that is needed next.
    """

    def __init__(self, ranks: list[int]) -> None:
        self.ranks, self.slot = ranks, 0
        self._last = -1
        self._held: tuple[int, T] | None = None

    def offer(self, rank: int, frame: T) -> Iterator[tuple[int, T]]:
        """What is selected, now that a frame was decoded: rank and frame of each."""
        if rank <= self._last:
            return
        while self.slot < len(self.ranks) and self.ranks[self.slot] < rank:  # this one is missing
            if self._held is not None:
                yield self._given(*self._held)
            elif self.slot + 1 < len(self.ranks) and self.ranks[self.slot + 1] <= rank:
                self.slot += 1
            else:
                break
        if self.slot < len(self.ranks) and self.ranks[self.slot] <= rank:
            yield self._given(rank, frame)
        else:
            self._held = rank, frame

    def rest(self) -> Iterator[tuple[int, T]]:
        """The last selected frame, if the frames end before the last rank."""
        if self.slot < len(self.ranks) and self._held is not None:
            yield self._given(*self._held)

    def _given(self, rank: int, frame: T) -> tuple[int, T]:
        self.slot, self._last, self._held = self.slot + 1, rank, None
        return rank, frame


def _codec(stream: Any) -> str:
    """FFmpeg's name of the stream's codec, whatever decoder is used for it."""
    return stream.codec_context.codec.canonical_name


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))


def _preference(stream: Any) -> int:
    from av.stream import Disposition

    size = stream.codec_context
    bonus = DEFAULT_STREAM_PIXELS * bool(stream.disposition & Disposition.default)
    return bonus + (size.width * size.height if size else 0)


def _is_intra(frame: Any) -> bool:
    """Whether a frame needs no other frames. H.264 also marks a start of gradual refresh as a key frame."""
    return frame.pict_type in INTRA_TYPES or (frame.pict_type == 0 and frame.key_frame)
