"""`data:` URLs as browsers read them: the WHATWG Fetch standard's data: URL processor and forgiving base64.

White space is dropped, padding may be missing, percent signs are decoded, a fragment is cut off, and a body without
`;base64` is the bytes themselves. The URL-safe alphabet is refused, as by browsers. The declared type is ignored.
"""

from __future__ import annotations

import base64
import binascii
import io
import re

import numpy as np

from mm.data.media import Kind
from mm.errors import MediaError
from mm.media.limits import MediaBudget

LINE_BREAKS = b"\t\n\r"
"""What URLs drop wherever it stands."""

WHITE_SPACE = b"\t\n\f\r "
"""What base64 drops wherever it stands."""

BLANK = bytes(range(0x21)).decode()
"""The C0 controls and the space, which URLs drop at both ends."""

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
IS_BASE64 = re.compile(r"; *base64$", re.IGNORECASE)
HAS_BASE64 = re.compile(r"(^data:|;) *base64 *(;|$)", re.IGNORECASE)
CHARACTER = re.compile(r"%[\t\n\r]*([0-9A-Fa-f])[\t\n\r]*([0-9A-Fa-f])|.", re.DOTALL)
HINTS = {"-": "; send + in its place", "_": "; send / in its place", "=": "; it may only fill up the end"}
PIECE_CHARS = 1 << 18
"""Characters of base64 that are decoded at a time, a multiple of 4."""

NUM_SCHEME_CHARS = 32
"""Characters at the start of a text in which `data:` is looked for, white space included."""

NO_DIGIT = 255
HEX_VALUES = bytes(int(chr(i), 16) if chr(i) in "0123456789abcdefABCDEF" else NO_DIGIT for i in range(256))


def is_data_url(text: str) -> bool:
    """Whether a browser would read `text` as a `data:` URL."""
    return _without_line_breaks(text[:NUM_SCHEME_CHARS].lstrip(BLANK))[:5].lower() == "data:"


def read_data_url(url: str, kind: Kind, budget: MediaBudget) -> bytes:
    """The bytes of a `data:` URL.

    Raises:
        MediaError: `bad_data_url`, which names the character and its place, or `too_many_bytes`.
    """
    fragment = url.find("#")
    end = len(url.rstrip(BLANK)) if fragment < 0 else fragment
    comma = url.find(",", 0, end)
    if comma < 0:
        raise _refusal(kind, "has no comma between the type and the content")
    header = _without_line_breaks(url[:comma].lstrip(BLANK)).rstrip(" ")
    if IS_BASE64.search(header):
        return _from_base64(url, comma + 1, end, kind, budget)
    if HAS_BASE64.search(header):
        raise _refusal(kind, "has to have ;base64 directly before the comma")
    content = _content(url, comma + 1, end, kind)
    budget.check_bytes(kind, len(content))
    return content


def _without_line_breaks(text: str) -> str:
    return text.translate(dict.fromkeys(LINE_BREAKS))


def _from_base64(url: str, start: int, end: int, kind: Kind, budget: MediaBudget) -> bytes:
    plain = _from_plain_base64(url, start, end, kind, budget)
    if plain is not None:
        return plain
    digits = _content(url, start, end, kind).translate(None, WHITE_SPACE)
    if len(digits) % 4 == 0:
        digits = digits.removesuffix(b"=").removesuffix(b"=")
    budget.check_bytes(kind, len(digits) * 3 // 4)
    if digits.translate(None, ALPHABET):
        raise _refusal(kind, _wrong_character(url, start))
    if len(digits) % 4 == 1:
        raise _refusal(kind, f"has {len(digits)} characters of base64, one too many or too few; it may be cut short")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4))


def _from_plain_base64(url: str, start: int, end: int, kind: Kind, budget: MediaBudget) -> bytes | None:
    """The bytes of what is base64 from its first to its last character, as nearly always; None of anything else.

    Decoded in pieces, between which other threads run: whole, a large clip would hold the interpreter for .1 s.
    """
    num_padding = 2 if url.endswith("==", start, end) else int(url.endswith("=", start, end))
    num_bytes = (end - start) // 4 * 3 - num_padding
    if (end - start) % 4:
        return None
    decoded = io.BytesIO()
    try:
        for i in range(start, end, PIECE_CHARS):
            decoded.write(binascii.a2b_base64(url[i : min(i + PIECE_CHARS, end)], strict_mode=True))
            budget.check_bytes(kind, decoded.tell())
    except ValueError:
        return None
    return decoded.getvalue() if decoded.tell() == num_bytes else None  # fewer with padding inside


def _content(url: str, start: int, end: int, kind: Kind) -> bytes:
    """What follows the comma, without line breaks and percent codes."""
    try:
        raw = url[start:end].encode().translate(None, LINE_BREAKS)
    except UnicodeEncodeError as error:
        raise _refusal(kind, f"has half of a character at index {start + error.start}") from None
    return _percent_decoded(raw) if b"%" in raw else raw


def _percent_decoded(raw: bytes) -> bytes:
    """Each `%` before two hexadecimal digits becomes one byte. Other percent signs stay."""
    text = np.frombuffer(raw + b"  ", np.uint8)
    values = np.frombuffer(raw.translate(HEX_VALUES) + bytes([NO_DIGIT] * 2), np.uint8)
    high, low = values[1:-1], values[2:]
    is_code = (text[:-2] == ord("%")) & (high != NO_DIGIT) & (low != NO_DIGIT)
    decoded = text.copy()
    decoded[:-2][is_code] = high[is_code] << 4 | low[is_code]
    is_kept = np.ones(len(text), bool)
    is_kept[1:-1] &= ~is_code
    is_kept[2:] &= ~is_code
    return decoded[:-2][is_kept[:-2]].tobytes()


def _wrong_character(url: str, start: int) -> str:
    """Which character of the content base64 does not have, and where."""
    allowed = (ALPHABET + WHITE_SPACE).decode()
    for found in CHARACTER.finditer(url, start):
        character = chr(int(found[1] + found[2], 16)) if found[1] else found[0]
        if character not in allowed:
            break
    else:
        raise AssertionError("every character belongs to base64")
    shown = repr(character) if character.isprintable() else f"U+{ord(character):04X}"
    as_code = ", as a percent code" if found[1] else ""
    return f"has {shown} at index {found.start()}{as_code}, where base64 does not allow it{HINTS.get(character, '')}"


def _refusal(kind: Kind, problem: str) -> MediaError:
    return MediaError("bad_data_url", kind, allowed=problem)
