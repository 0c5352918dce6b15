"""A question with its answer, and where in the picture each piece of the answer is found.

`focus` names the visual tokens an answer token is read from: the training's attention loss needs them, nothing else
does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from demos.train.data.language import draw_wording
from demos.train.data.things import COLORS, COLUMNS, ROWS, SHAPES, SIZES, Thing

Focus = tuple[int, ...]
T = TypeVar("T")
PLURALS = {s: f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES}
CONTENT = {*COLORS, *SHAPES, *SIZES, *ROWS, *COLUMNS}


@dataclass(frozen=True)
class Span:
    """Characters start..stop of an answer are read from focus (in clips: after the event) and other (before it)."""

    start: int
    stop: int
    focus: Focus
    other: Focus = ()


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    focus: visual tokens of the asked thing (all matching ones for a count, none if nothing matches).
    other: those of the second thing of a relation, or of the moment before an event.
    spans: for answers that enumerate, one per written piece, in order.
    """

    kind: str
    text: str
    answer: str
    focus: Focus = ()
    other: Focus = ()
    spans: tuple[Span, ...] = ()


class Composer:
    """Builds an answer piece by piece, remembering where each piece is read from."""

    def __init__(self) -> None:
        self.answer = ""
        self.spans: list[Span] = []

    def add(self, piece: str, focus: Focus, other: Focus = ()) -> "Composer":
        if piece:
            self.spans.append(Span(len(self.answer), len(self.answer) + len(piece), focus, other))
            self.answer += piece
        return self

    def spell(self, string: str, characters: Focus) -> "Composer":
        """Add a string whose characters are in one patch each."""
        for character, patch in zip(string, characters, strict=True):
            self.add(character, (patch,))
        return self

    def question(self, kind: str, text: str) -> Question:
        return Question(kind, text, self.answer, spans=tuple(self.spans))


class Asker:
    """What the askers of scenes and clips share: the wording and the random choices."""

    video = False

    def __init__(self, rng: np.random.Generator, *, unseen: bool = False) -> None:
        self.rng, self.unseen = rng, unseen

    def word(self, kind: str, *parts: str) -> str:
        return draw_wording(self.rng, kind, *parts, unseen=self.unseen, video=self.video)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def ask(self, kind: str) -> Question | None:
        """A question of the kind, None where there is nothing to ask."""
        return getattr(self, f"ask_{kind}")()


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def alone(things: tuple[Thing, ...], attribute: str) -> list[int]:
    """Things that are the only one with their value of an attribute."""
    values = [getattr(t, attribute) for t in things]
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def content(answer: str) -> tuple[frozenset[str], ...]:
    """What a description says, piece by piece in order, apart from how it says it.

    A piece is the text between full stops: its words for colors, shapes, sizes and cells, and its quoted text.
    """
    pieces = []
    for piece in re.split(r"[.;,:]| and ", answer):
        quoted = re.findall(r'"[^"]*"?|\b\d+\b', piece)
        words = set(re.findall(r"[a-z]+", re.sub(r'"[^"]*"?', "", piece)))
        if found := frozenset((words & CONTENT) | set(quoted)):
            pieces.append(found)
    return tuple(pieces)
