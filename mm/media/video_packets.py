"""The packets of a clip: which frame each one holds, when it is shown, and where decoding may start.

All of it comes from the packets themselves. Durations and frame counts in headers are not read, since many files lack
them or state them wrongly. The video child imports this file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mm.media.edit_lists import Gap

JUMPING = frozenset({"mpegts", "mpeg", "flv", "ogg"})
"""Demuxers of formats whose time stamps may jump within a file, because programmes were cut together."""

LARGEST_GAP_S, LARGEST_STEP_BACK_S = 10.0, 0.1
"""A larger step between two packets of such a format is a jump. These are ffmpeg's bounds."""

ROUNDING_S = 0.001
"""What the clocks of an MP4 file and of its track may differ by."""

MAX_READ_ERRORS = 100
"""After so many errors in a row the rest of the file is given up."""

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

Ints = npt.NDArray[np.int64]


class PacketReader:
    """The packets of one stream in the order of the file, with true stamps. Reading the same file twice gives the same.

    Attributes:
        num_errors: Read errors so far.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container, self._stream = container, stream
        self._jumps = container.format.name in JUMPING
        self._second = 1 / float(stream.time_base or 1)
        self._offset = 0
        self._newest: int | None = None
        self._expected = 0
        self.num_errors = 0

    def __iter__(self) -> Iterator[Any]:
        """PyAV packets that hold data. An unreadable part is skipped."""
        from av.error import FFmpegError

        errors_in_a_row = 0
        while errors_in_a_row < MAX_READ_ERRORS:
            try:
                for packet in self._container.demux(self._stream):
                    errors_in_a_row = 0
                    # An empty packet would end the decoder. One is at the end, and in AVI one stands for a repetition.
                    if packet.size:
                        self._place(packet)
                        yield packet
                return
            except MemoryError:
                raise
            except FFmpegError:
                errors_in_a_row += 1
                self.num_errors += 1

    def _place(self, packet: Any) -> None:
        """Undo jumps: the packet after a jump follows the one before it at once."""
        if not self._jumps or packet.dts is None:
            return
        dts = packet.dts + self._offset
        if self._newest is not None:
            is_ahead = dts > self._expected + LARGEST_GAP_S * self._second
            if is_ahead or dts < self._newest - LARGEST_STEP_BACK_S * self._second:
                self._offset += self._expected - dts
                dts = self._expected
        gap = dts - self._newest if self._newest is not None and dts > self._newest else 0
        self._newest = dts if self._newest is None else max(self._newest, dts)
        self._expected = dts + (packet.duration or gap)
        packet.dts = dts
        if packet.pts is not None:
            packet.pts += self._offset


class PacketTable:
    """All packets of a clip, by their index in the file.

    Attributes:
        has_times: Whether every shown packet has a presentation time. Else the order of the frames is known only when
            they are decoded.
    """

    def __init__(self, reader: PacketReader, codec: str, has_times: bool) -> None:
        shown_at, decoded_at, durations, flags = array("q"), array("q"), array("q"), bytearray()
        self.has_times = has_times
        for packet in reader:
            pts, dts = packet.pts, packet.dts
            is_shown = (pts, dts) != (None, None) and not packet.is_discard and not _is_hidden(packet, codec)
            self.has_times = self.has_times and (pts is not None or not is_shown)
            shown_at.append(pts if pts is not None else dts or 0)
            decoded_at.append(dts if dts is not None else pts or 0)
            durations.append(packet.duration or 0)
            flags.append(packet.is_keyframe | is_shown << 1)
        self._stamps = np.array(shown_at if self.has_times else decoded_at, np.int64)
        self._durations = np.array(durations, np.int64)
        self._keys = np.flatnonzero(np.frombuffer(flags, np.uint8) & 1)
        self.shown = np.flatnonzero(np.frombuffer(flags, np.uint8) & 2)

    def __len__(self) -> int:
        return len(self._stamps)

    def timeline(self, base: float, frame_rate: float, gaps: list[Gap]) -> Timeline:
        """When the shown packets are on screen, if all have presentation times.

        Args:
            base: Seconds of a unit of the stamps.
            frame_rate: Frames per second. The file's word for it, used only for clips of one frame.
            gaps: Times without a picture that the stamps leave out.
        """
        order = np.argsort(self._stamps[self.shown], kind="stable")
        indices = self.shown[order]
        stamps = self._stamps[indices]
        moved_s = np.zeros(len(stamps))
        for gap in gaps:
            moved_s[stamps * base >= gap.at_s - ROUNDING_S] += gap.length_s
        stamps = stamps + np.rint(moved_s / base).astype(np.int64)
        return self._timeline(indices, stamps, base, frame_rate)

    def counted_timeline(self, decoded: list[int], delay: int, base: float, frame_rate: float) -> Timeline:
        """The same from the packet indices of all decoded frames, in their order. The k-th frame has the k-th time.

        Args:
            delay: Packets that the decoder had taken before the one with which it gave the first frame. Without
                presentation times a frame is shown when it comes out of the decoder.
        """
        indices = np.array(decoded, np.int64)
        stamps = np.sort(self._stamps[indices])
        if not self.has_times and 0 < delay < len(stamps):
            step = max(int(np.median(np.diff(stamps))), 1)
            stamps = np.concatenate([stamps[delay:], stamps[-1] + step * np.arange(1, delay + 1)])
        return self._timeline(indices, stamps, base, frame_rate)

    def _timeline(self, indices: Ints, stamps: Ints, base: float, frame_rate: float) -> Timeline:
        last = float(self._durations[indices[-1]])
        if last <= 0:  # unknown
            steps = np.diff(stamps)
            steps = steps[steps > 0]
            last = float(np.median(steps)) if len(steps) else 1 / (frame_rate * base) if frame_rate > 0 else 0.0
        shown_at = stamps - stamps[0]
        return Timeline(indices, shown_at * base, (float(shown_at[-1]) + last) * base, len(self))

    def start(self, index: int) -> int:
        """Index of the last key frame that comes before a packet in the file and in time. 0 if there is none."""
        at = int(np.searchsorted(self._keys, index, side="right")) - 1
        while at >= 0 and self._stamps[self._keys[at]] > self._stamps[index]:
            at -= 1
        return int(self._keys[at]) if at >= 0 else 0


class Timeline:
    """The frames of a clip in the order in which they are shown.

    Attributes:
        indices: The packet of each frame.
        times_s: When each frame appears, in seconds after the first one; ascending.
        duration_s: End of the last frame.
    """

    def __init__(self, indices: Ints, times_s: npt.NDArray[np.float64], duration_s: float, num_packets: int) -> None:
        self.indices, self.times_s, self.duration_s = indices, times_s.tolist(), duration_s
        self._ranks = np.full(num_packets, -1, np.int64)
        self._ranks[indices] = np.arange(len(indices))

    def __len__(self) -> int:
        return len(self.indices)

    def from_rank(self, rank: int) -> Timeline:
        """The same without the first `rank` frames. Time starts at the first that is left."""
        times_s = np.array(self.times_s[rank:])
        begin_s = self.times_s[rank]
        return Timeline(self.indices[rank:], times_s - begin_s, self.duration_s - begin_s, len(self._ranks))

    def rank(self, index: int | None) -> int | None:
        """The place of a packet's frame among the frames, or None if it is not shown."""
        if index is None or not 0 <= index < len(self._ranks) or self._ranks[index] < 0:
            return None
        return int(self._ranks[index])


def _is_hidden(packet: Any, codec: str) -> bool:
    """Whether a packet holds a VP8 frame that is only a reference for others: its first byte lacks the flag."""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10
