"""The container format of a clip, and whether the clip is cut short, read from its bytes without a library.

This runs before any decoder gets the clip. So playlists and scripts, which would make a library open other files or
addresses, never reach one.
"""

from __future__ import annotations

from typing import Literal

Container = Literal["mp4", "matroska", "avi", "mpegts", "mpegps", "flv", "ogg", "asf", "gif", "apng", "webp"]

PICTURE_FORMATS = frozenset({"gif", "apng", "webp"})
"""Formats of animated pictures. Their files are also pictures."""

MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"uuid", b"sidx")
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
UNKNOWN_RIFF_SIZE = 0xFFFFFFFF
"""What a writer leaves that cannot go back to the start, as in live recordings. Others leave 0."""

PNG = b"\x89PNG\r\n\x1a\n"
SIGNATURES: dict[bytes, Container] = {
    EBML: "matroska",
    b"\0\0\1\xba": "mpegps",
    b"FLV\1": "flv",
    b"OggS": "ogg",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
}
FOREIGN_SIGNATURES = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a list of files",
    b"<?xml": "XML",
    b"<MPD": "a DASH playlist",
    b"\0\0\1\xb3": "a bare MPEG stream",
    b"DKIF": "IVF",
    b"YUV4MPEG": "Y4M",
    b"\x06\x0e\x2b\x34": "MXF",
    b".RMF": "RealMedia",
    b"nut/": "NUT",
    b"\x89PNG": "a still PNG",
    b"\xff\xd8\xff": "a JPEG picture",
    b"BM": "a BMP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"ID3": "an MP3 file",
    b"fLaC": "a FLAC file",
    b"%PDF": "a PDF",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
}
"""Signatures of playlists and other formats that are refused. Their error differs from that of a damaged file."""


def sniff(data: bytes) -> Container | None:
    """The container format of a file that starts with `data`, or None if it is not supported. 4 kB are enough."""
    if data[4:8] in MP4_FIRST_BOXES:
        return "mp4"
    if data.startswith(b"RIFF"):
        if data[8:11] == b"AVI":
            return "avi"
        return "webp" if data[8:16] == b"WEBPVP8X" and len(data) > 20 and data[20] & 2 else None
    if data.startswith(PNG):
        return "apng" if _is_animated_png(data) else None
    if _is_transport_stream(data):
        return "mpegts"
    return next((name for signature, name in SIGNATURES.items() if data.startswith(signature)), None)


def foreign_name(data: bytes) -> str:
    """What `data` is, if it starts a known format that is refused here. Else empty."""
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b"WAVE"):
        return "a still WebP" if data[8:12] == b"WEBP" else "a WAV file"
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:8]
    return next((name for signature, name in FOREIGN_SIGNATURES.items() if start.startswith(signature)), "")


def _is_transport_stream(data: bytes) -> bool:
    """Whether packets of 188 bytes begin with their mark; in M2TS four bytes stand before each, in DVB 16 after it."""
    for size, first in ((188, 0), (192, 4), (204, 0)):
        marks = data[first : first + 5 * size : size]
        if len(marks) >= 2 and set(marks) == {0x47}:
            return True
    return False


def _is_animated_png(data: bytes) -> bool:
    """Whether the chunk that announces an animation comes before the pixels."""
    at = len(PNG)
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
        if data[at + 4 : at + 8] == b"acTL":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def is_cut_short(data: bytes, container: Container) -> bool:
    """Whether the container declares more bytes than there are. Most decoders would stop early without an error.

    MPEG streams, FLV, Ogg and ASF do not declare their size.
    """
    if container == "mp4":
        return _mp4_end(data) > len(data)
    if container == "matroska":
        return _matroska_end(data) > len(data)
    if container in ("avi", "webp"):
        size = int.from_bytes(data[4:8], "little")
        return size != UNKNOWN_RIFF_SIZE and 8 + size > len(data)
    if container == "apng":
        return b"IEND" not in data[-4096:]
    return container == "gif" and _gif_end(data) > len(data)


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
