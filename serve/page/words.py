"""An answer's text with what is worth seeing marked: words that differ from another answer, and drafted text."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from html import escape

from serve.page.reply import Piece

WORD = re.compile(r"\S+")


def marked(text: str, pieces: Sequence[Piece] = (), other: str | None = None) -> str:
    """The text as HTML.

    Args:
        pieces: The text in runs; where they are not the text nothing is marked as drafted.
        other: The answer with which it is compared, word by word; None marks no word.
    """
    if not text.strip():
        return "<em>(an empty answer)</em>"
    is_drafted, differs = _drafted(text, pieces), _differing(text, other)
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    runs = itertools.groupby(range(start, end), key=lambda i: (is_drafted[i], differs[i]))
    return "".join(_run("".join(text[i] for i in places), *looks) for looks, places in runs)


def _run(text: str, is_drafted: bool, differs: bool) -> str:
    classes = [name for name, on in (("mm-drafted", is_drafted), ("mm-differs", differs)) if on]
    return f'<mark class="{" ".join(classes)}">{escape(text)}</mark>' if classes else escape(text)


def _drafted(text: str, pieces: Sequence[Piece]) -> list[bool]:
    """Per character."""
    if "".join(piece.text for piece in pieces) != text:
        return [False] * len(text)
    return [piece.is_drafted for piece in pieces for _ in piece.text]


def _differing(text: str, other: str | None) -> list[bool]:
    """Per character: whether it is of a word that the other answer does not have there."""
    found = [False] * len(text)
    if other is None:
        return found
    words = list(WORD.finditer(text))
    matcher = difflib.SequenceMatcher(None, [word[0] for word in words], WORD.findall(other), autojunk=False)
    for tag, start, end, _, _ in matcher.get_opcodes():
        if tag in ("replace", "delete"):
            span = range(words[start].start(), words[end - 1].end())
            found[span.start : span.stop] = [True] * len(span)
    return found
