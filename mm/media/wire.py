"""Messages between us and the video child: a length, a JSON header, then raw bytes.

Standard library only, nothing executable.

Both sides treat the other's lengths as hostile: headers are bounded, and the body's length is checked by the reader
before it is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 1 << 14
OUT_OF_MEMORY_STATUS = 3
"""Exit status of a child that cannot even hold its request."""


class WireClosed(Exception):
    """The other side closed the pipe, or does not speak the protocol."""


def write_message(pipe: BinaryIO, header: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
    """Send one message. The body's length travels as `num_bytes`."""
    text = json.dumps({**header, "num_bytes": len(body)}).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    pipe.write(body)
    pipe.flush()


def read_header(pipe: BinaryIO) -> dict[str, Any]:
    """The next message's header; its body of `num_bytes` is still to be read.

    Raises:
        WireClosed: The pipe ended, or what came is no header.
    """
    (length,) = struct.unpack("<I", read_exactly(pipe, 4))
    if length > MAX_HEADER_BYTES:
        raise WireClosed
    try:
        header = json.loads(read_exactly(pipe, length))
    except ValueError as error:
        raise WireClosed from error
    if not isinstance(header, dict) or not isinstance(header.get("num_bytes"), int):
        raise WireClosed
    return header


def read_exactly(pipe: BinaryIO, num_bytes: int) -> bytes:
    """Exactly `num_bytes`.

    Raises:
        WireClosed: Fewer came.
    """
    body = pipe.read(num_bytes) if num_bytes >= 0 else b""
    if len(body) != num_bytes:
        raise WireClosed
    return body
