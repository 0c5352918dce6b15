"""Changes to the boxes of MP4 files and the elements of Matroska files that ffmpeg cannot write itself."""

from __future__ import annotations

import struct
from collections.abc import Callable

EMPTY = -1
"""The media time of an edit during which nothing is shown."""


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def children(data: bytes, at: int, end: int) -> list[tuple[bytes, int, int]]:
    """Name, start and end of each box between two offsets."""
    found = []
    while at + 8 <= end:
        size, name = struct.unpack(">I4s", data[at : at + 8])
        if size == 1:
            size = struct.unpack(">Q", data[at + 8 : at + 16])[0]
        elif size == 0:
            size = end - at
        found.append((name, at, at + size))
        at += size
    return found


def changed(data: bytes, path: tuple[bytes, ...], change: Callable[[bytes], bytes]) -> bytes:
    """The file with the body of a box changed; sizes of its parents follow. `moov` has to be the last box."""
    name, rest = path[0], path[1:]
    for found, at, end in children(data, 0, len(data)):
        if found == name:
            body = data[at + 8 : end]
            body = changed(body, rest, change) if rest else change(body)
            return data[:at] + box(name, body) + data[end:]
    raise ValueError(f"no box {name!r}")


def with_edits(mp4: bytes, edits: list[tuple[int, int]]) -> bytes:
    """The file with an edit list in its first track.

    Args:
        edits: Duration in the units of the movie (1/1000 s), and media time in those of the track, or `EMPTY`.
    """
    entries = b"".join(struct.pack(">Iihh", duration, media_time, 1, 0) for duration, media_time in edits)
    edts = box(b"edts", box(b"elst", struct.pack(">II", 0, len(edits)) + entries))

    def add(trak: bytes) -> bytes:
        kept = [(at, end) for name, at, end in children(trak, 0, len(trak)) if name != b"edts"]
        first, *others = [trak[at:end] for at, end in kept]
        return first + edts + b"".join(others)

    return changed(mp4, (b"moov", b"trak"), add)


def with_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The file with a display matrix: x goes to (a, b), and y to (c, d)."""
    rows = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return changed(mp4, (b"moov", b"trak", b"tkhd"), lambda body: body[:40] + rows + body[76:])


def with_durations(mp4: bytes, factor: float) -> bytes:
    """The file with another duration in the headers of movie, track and media. All have version 0."""

    def scaled(at: int) -> Callable[[bytes], bytes]:
        def change(body: bytes) -> bytes:
            (duration,) = struct.unpack(">I", body[at : at + 4])
            return body[:at] + struct.pack(">I", int(duration * factor)) + body[at + 4 :]

        return change

    mp4 = changed(mp4, (b"moov", b"mvhd"), scaled(16))
    mp4 = changed(mp4, (b"moov", b"trak", b"tkhd"), scaled(20))
    return changed(mp4, (b"moov", b"trak", b"mdia", b"mdhd"), scaled(16))


def without(data: bytes, path: tuple[bytes, ...]) -> bytes:
    """The file with a box turned into free space."""
    parent = path[:-1]

    def hide(body: bytes) -> bytes:
        for name, at, _ in children(body, 0, len(body)):
            if name == path[-1]:
                return body[: at + 4] + b"free" + body[at + 8 :]
        raise ValueError(f"no box {path[-1]!r}")

    return changed(data, parent, hide)


def matroska_duration(data: bytes, seconds: float) -> bytes:
    """A Matroska file with another duration in its header; the unit is a millisecond. 0 hides the element."""
    at = data.index(b"\x44\x89\x88")  # Duration, 8 bytes
    if not seconds:
        return data[:at] + b"\xec\x89" + data[at + 2 :]  # Void with the same length: 1 byte of name, 9 of body
    return data[: at + 3] + struct.pack(">d", seconds * 1000) + data[at + 11 :]
