"""Gaps in the edit lists of MP4 files: empty edits after the first shown one.

FFmpeg reads an empty edit only at the start of a list. A later one it plays as media from the start of the track. So
they are taken out of the list before FFmpeg sees it, and the frames after each are moved. The video child imports this.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mm.media.containers import MP4_FIRST_BOXES

EMPTY = -1


class Gap(NamedTuple):
    """A time in seconds on the time line without gaps, and how much later everything from there on is shown."""

    at_s: float
    length_s: float


class PatchedFile:
    """A file to read, some bytes of which are replaced."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.patches: list[tuple[int, bytes]] = []

    def read(self, num_bytes: int = -1) -> bytes:
        """As of any file."""
        begin = self._file.tell()
        data = self._file.read(num_bytes)
        for at, new in self.patches:
            first, last = max(at, begin), min(at + len(new), begin + len(data))
            if first < last:
                data = data[: first - begin] + new[first - at : last - at] + data[last - begin :]
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()


def without_gaps(file: BinaryIO) -> tuple[PatchedFile, dict[int, list[Gap]]]:
    """The file without gaps in its edit lists, and the gaps of each track by its id. Other files stay as they are."""
    patched, gaps = PatchedFile(file), dict[int, list[Gap]]()
    file.seek(0)
    moov_at, moov = _movie(file) if file.read(8)[4:] in MP4_FIRST_BOXES else (0, b"")
    header = next((moov[at:end] for name, at, end in _boxes(moov, 0, len(moov)) if name == b"mvhd"), b"")
    scale = int.from_bytes(header[20:24] if header[:1] == b"\1" else header[12:16], "big")
    for name, at, end in _boxes(moov, 0, len(moov)):
        if name != b"trak" or not scale:
            continue
        track = {child: (start, stop) for child, start, stop in _boxes(moov, at, end)}
        if b"tkhd" not in track or b"edts" not in track:
            continue
        start = track[b"tkhd"][0]
        id_at = start + (20 if moov[start] == 1 else 12)
        for child, first, last in _boxes(moov, *track[b"edts"]):
            if child == b"elst" and (found := _read_gaps(moov[first:last], scale)):
                patched.patches.append((moov_at + first, found[0]))
                gaps[int.from_bytes(moov[id_at : id_at + 4], "big")] = found[1]
    return patched, gaps


def _read_gaps(elst: bytes, scale: int) -> tuple[bytes, list[Gap]] | None:
    """The body of the box without gaps and with its length, and the gaps. None if there are none."""
    layout = struct.Struct(">QqI" if elst[:1] == b"\1" else ">IiI")
    usable = elst[8 : 8 + (len(elst) - 8) // layout.size * layout.size]
    entries = list(layout.iter_unpack(usable))[: int.from_bytes(elst[4:8], "big")]
    kept: list[tuple[int, int, int]] = []
    gaps: list[Gap] = []
    passed = 0
    for duration, media_time, rate in entries:
        if media_time == EMPTY and kept and kept[-1][1] != EMPTY:
            gaps.append(Gap(passed / scale, duration / scale))
        else:
            kept.append((duration, media_time, rate))
            passed += duration
    if not gaps:
        return None
    body = elst[:4] + len(kept).to_bytes(4, "big") + b"".join(layout.pack(*entry) for entry in kept)
    return body.ljust(len(elst), b"\0"), gaps


def _movie(file: BinaryIO) -> tuple[int, bytes]:
    """Where the body of the box `moov` begins, and the body. Empty if there is none."""
    at = 0
    while True:
        file.seek(at)
        header = file.read(16)
        size, first = int.from_bytes(header[:4], "big"), 8
        if size == 1:
            size, first = int.from_bytes(header[8:16], "big"), 16
        if len(header) < 16 or size < first:
            return 0, b""
        if header[4:8] == b"moov":
            file.seek(at + first)
            return at + first, file.read(size - first)
        at += size


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name of each box between two offsets, and where its body begins and ends."""
    while at + 8 <= end:
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8 or at + size > end:
            return
        yield data[at + 4 : at + 8], at + 8, at + size
        at += size
