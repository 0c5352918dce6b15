"""The container format of a clip, and whether the clip is cut short, read from its bytes without a library.

This runs before any decoder gets the clip. So playlists and scripts, which would make a library open other files or
addresses, never reach one.
"""

from __future__ import annotations

from typing import Literal

Container = Literal["mp4", "matroska", "avi", "gif"]

MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"uuid")
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
FOREIGN_SIGNATURES = (
    b"#EXTM3U",
    b"ffconcat",
    b"<?xml",
    b"<MPD",
    b"FLV",
    b"OggS",
    b"\x30\x26\xb2\x75",
    b"\0\0\1\xba",
    b"\0\0\1\xb3",
    b"\x47\x40",
)
"""Signatures of playlists, FLV, Ogg, ASF and MPEG streams. These formats are refused."""


def sniff(data: bytes) -> Container | None:
    """The container format of a file that starts with `data`, or None if it is not supported."""
    if data[4:8] in MP4_FIRST_BOXES:
        return "mp4"
    if data.startswith(EBML):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:11] == b"AVI":
        return "avi"
    return "gif" if data.startswith((b"GIF87a", b"GIF89a")) else None


def is_foreign(data: bytes) -> bool:
    """Whether `data` starts a known video or playlist format that is refused here."""
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:8].startswith(FOREIGN_SIGNATURES)


def is_cut_short(data: bytes, container: Container) -> bool:
    """Whether the container declares more bytes than there are. Most decoders would stop early without an error."""
    if container == "mp4":
        return _mp4_end(data) > len(data)
    if container == "matroska":
        return _matroska_end(data) > len(data)
    if container == "avi":
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    return _gif_end(data) > len(data)


def _mp4_end(data: bytes) -> int:
    """Offset of the end of the last media box. An unknown box ends the search, since some writers append padding."""
    at = 0
    while at + 8 <= len(data) and data[at + 4 : at + 8] in (
        *MP4_FIRST_BOXES,
        b"sidx",
        b"mfra",
        b"meta",
        b"emsg",
        b"udta",
    ):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: up to the end of the file
            break
        at += size
    return at


def _gif_end(data: bytes) -> int:
    """Offset of the end of the last block. Beyond the data if a block is cut. A missing trailer is allowed."""
    at = 13 + _gif_table_bytes(data, 10)
    while at < len(data) and data[at] in (0x21, 0x2C):  # extension, frame
        is_frame = data[at] == 0x2C
        at += 11 + _gif_table_bytes(data, at + 9) if is_frame else 2
        while at < len(data) and data[at]:  # sub-blocks, each after its length; an empty one is the last
            at += 1 + data[at]
        at += 1
    return at


def _gif_table_bytes(data: bytes, at: int) -> int:
    """Size of the colour table that the flags at offset `at` declare."""
    flags = data[at] if at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _matroska_end(data: bytes) -> int:
    """Offset of the end of the segment, or 0 if its size is unknown, as in live recordings."""
    header_end = _ebml_end(data, len(EBML))
    if header_end is None or data[header_end : header_end + 4] != SEGMENT:
        return 0
    return _ebml_end(data, header_end + 4) or 0


def _ebml_end(data: bytes, at: int) -> int | None:
    """Offset of the end of the element whose size field is at `at`. None if the size is unknown."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()  # number of leading zero bits, plus one
    if not 1 <= length <= 8:
        return None
    field = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return None if field == (1 << 7 * length) - 1 else at + length + field
