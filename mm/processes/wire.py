"""Messages between a process and its child: a length, a JSON header, then raw bytes.

Neither side trusts the other. Headers are bounded, and the reader checks the body's length before it reads the body.
Children import this file and have to start fast, so it uses the standard library only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

MAX_HEADER_BYTES = 1 << 14
OUT_OF_MEMORY_STATUS = 3
"""Exit status of a child that has not enough memory for its request."""


class WireClosed(Exception):
    """The other side closed the pipe or violated the protocol."""


def write_message(pipe: BinaryIO, header: Mapping[str, Any], body: bytes | memoryview = b"") -> None:
    """Send one message. The header gets the body's length as `num_bytes`."""
    text = json.dumps({**header, "num_bytes": len(body)}).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    pipe.write(body)
    pipe.flush()


def read_header(pipe: BinaryIO) -> dict[str, Any]:
    """The header of the next message. Its body of `num_bytes` has to be read next.

    Raises:
        WireClosed: The pipe ended, or the header is malformed.
    """
    (length,) = struct.unpack("<I", read_exactly(pipe, 4))
    if length > MAX_HEADER_BYTES:
        raise WireClosed
    try:
        header = json.loads(read_exactly(pipe, length))
    except ValueError as error:
        raise WireClosed from error
    if not isinstance(header, dict):
        raise WireClosed
    fields = cast(dict[str, Any], header)
    if not isinstance(fields.get("num_bytes"), int):
        raise WireClosed
    return fields


def read_exactly(pipe: BinaryIO, num_bytes: int) -> bytes:
    """Exactly `num_bytes`.

    Raises:
        WireClosed: The pipe ended before.
    """
    body = pipe.read(num_bytes) if num_bytes >= 0 else b""
    if len(body) != num_bytes:
        raise WireClosed
    return body
