"""JSON text to values, with bounds on what it may hold.

A large picture is one string, which is parsed in milliseconds. A text of the same size that consists of small values
would hold the interpreter, and so every other request, for a second. Their number is counted before anything is parsed,
by NumPy, which lets other threads run meanwhile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pydantic_core

from mm.errors import InvalidRequest, shown

MAX_VALUES = 100_000
"""Objects, lists, members and items of a body together."""
CHUNK_BYTES = 256 * 1024
QUOTE, BACKSLASH, COLON = ord('"'), ord("\\"), ord(":")
IS_STRUCTURE = np.zeros(256, dtype=bool)
IS_STRUCTURE[[ord(letter) for letter in ",:[{"]] = True


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON text in UTF-8.

    Numbers beyond the range of a float, NaN, lone surrogates, deep nesting, and a key that stands twice in an object
    are refused.

    Raises:
        InvalidRequest: `invalid_json`.
    """
    num_keys = _count_keys(body)
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise InvalidRequest(f"the body is not valid JSON: {reason}", None, "invalid_json") from None
    if _checked_keys(value) != num_keys:
        raise InvalidRequest(f"an object of the body has {_repeated_key(body)} twice", None, "invalid_json")
    return value


@dataclass(kw_only=True)
class _Position:
    """Where a chunk of the text begins.

    Attributes:
        in_string: Whether it is inside a string.
        is_escaped: Whether a backslash stands before its first byte.
    """

    in_string: bool = False
    is_escaped: bool = False


def _count_keys(body: bytes | bytearray) -> int:
    """Colons outside of strings, which is the number of keys if the text is JSON.

    Raises:
        InvalidRequest: There are too many values.
    """
    text = np.frombuffer(body, dtype=np.uint8)
    position, num_values, num_keys = _Position(), 1, 0
    for start in range(0, len(text), CHUNK_BYTES):
        marks = _structure(text[start : start + CHUNK_BYTES], position)
        num_in_chunk = int(np.count_nonzero(marks == COLON))
        num_keys += num_in_chunk
        num_values += len(marks) - num_in_chunk
        if num_values > MAX_VALUES:
            raise InvalidRequest(f"the body holds more than the limit of {MAX_VALUES} values", None, "invalid_json")
    return num_keys


def _structure(chunk: npt.NDArray[np.uint8], position: _Position) -> npt.NDArray[np.uint8]:
    """The commas, colons and opening brackets of a chunk that are outside of strings. Moves `position` to its end."""
    quotes = np.flatnonzero(chunk == QUOTE)
    escaped = _escaped(np.flatnonzero(chunk == BACKSLASH), position.is_escaped)
    position.is_escaped = bool(len(escaped)) and int(escaped[-1]) == len(chunk)
    if len(escaped):
        quotes = quotes[~np.isin(quotes, escaped, assume_unique=True)]
    marks = np.flatnonzero(IS_STRUCTURE[chunk])
    num_quotes_before = np.searchsorted(quotes, marks) + position.in_string
    position.in_string = bool((len(quotes) + position.in_string) % 2)
    return chunk[marks[num_quotes_before % 2 == 0]]


def _escaped(backslashes: npt.NDArray[np.intp], first_is_escaped: bool) -> npt.NDArray[np.intp]:
    """Places of the bytes that a backslash escapes: those after a run of an odd number of backslashes."""
    if not len(backslashes):
        return np.zeros(int(first_is_escaped), dtype=np.intp)
    begins = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
    lengths = np.diff(begins, append=len(backslashes))
    after = backslashes[begins] + lengths
    if first_is_escaped:
        if backslashes[0] == 0:  # the first backslash is escaped itself, so its run is one shorter
            lengths[0] -= 1
        else:
            return np.concatenate([[0], after[lengths % 2 == 1]])
    return after[lengths % 2 == 1]


def _checked_keys(value: Any) -> int:
    """The keys of all objects in a value.

    Raises:
        InvalidRequest: A number is infinite, because a float cannot hold it.
    """
    num_keys, values = 0, [value]
    while values:
        item = values.pop()
        if isinstance(item, dict):
            members = cast(dict[str, Any], item)
            num_keys += len(members)
            values += members.values()
        elif isinstance(item, list):
            values += cast(list[Any], item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise InvalidRequest("the body holds a number that is too large", None, "invalid_json")
    return num_keys


def _repeated_key(body: bytes | bytearray) -> str:
    """The first key that stands twice in an object."""
    repeated: list[str] = []

    def look(members: Sequence[tuple[str, Any]]) -> None:
        seen = set[str]()
        for name, _ in members:
            if name in seen:
                repeated.append(name)
            seen.add(name)

    json.loads(body, object_pairs_hook=look)
    return f"the key {shown(repeated[0])}" if repeated else "a key"
