"""When an answer is right. Three ways; every item names its own.

exact     The answer equals the right one (or an accepted one) after `plain`: compatibility forms of Unicode made one
          (NFKC), white space collapsed, quotation marks around the whole and final . and ! dropped, case ignored.
verbatim  As exact, but case counts: for characters read from a picture.
content   The answer states the same as the right one, in any sentences (`content`): the same objects
          with the same attributes and places, the same texts, the same events, in the same order. Nothing missing and
          nothing more. All other words are ignored.

What `content` reads, sentence by sentence:

- an *object*: a shape, with the size and colors named since the object before it. Synonyms are one (big = large);
- a *text*: characters in quotation marks, or a number, or two and more capitals and digits, letter by letter, with the
  colors named since the object before it;
- a *place*: words for row and column next to each other (upper left = top left; the middle one is center). In a
  sentence that begins with a place, a place belongs to what follows it, else to what precedes it;
- an *event*: a verb (moves, appears, disappears, turns, grows, shrinks) with its direction, new color or new shape.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Scoring = Literal["exact", "verbatim", "content"]

QUOTES = "\"'`“”‘’«»"


def plain(text: str, *, keep_case: bool = False) -> str:
    """`text` without the differences that do not count; see the module docstring."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    text = text.rstrip(".! ").strip(QUOTES).rstrip(".! ")
    return text if keep_case else text.casefold()


def is_right(answer: str, right: Iterable[str], scoring: Scoring) -> bool:
    """Whether `answer` counts as one of the `right` ones."""
    if scoring == "content":
        found = content(answer)
        return bool(found) and any(found == content(text) for text in right)
    keep_case = scoring == "verbatim"
    given = plain(answer, keep_case=keep_case)
    return any(given == plain(text, keep_case=keep_case) for text in right)


# ── content ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "brown", "gray")
SYNONYMS = {
    "grey": "gray",
    "big": "large",
    "huge": "large",
    "little": "small",
    "tiny": "small",
    "disc": "circle",
    "disk": "circle",
    "plus": "cross",
    "rhombus": "diamond",
    "upper": "top",
    "lower": "bottom",
    "centre": "center",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "leftward": "left",
    "leftwards": "left",
    "rightward": "right",
    "rightwards": "right",
}
SIZES = ("small", "large")
PLACES = ("top", "middle", "bottom", "left", "center", "right")
DIRECTIONS = ("left", "right", "up", "down")
VERBS = {
    "move": ("move", "moves", "moved", "moving", "slides", "travels"),
    "appear": ("appear", "appears", "appeared", "appearing"),
    "disappear": ("disappear", "disappears", "disappeared", "disappearing", "vanishes", "vanish", "vanished"),
    "turn": ("turn", "turns", "turned", "turning", "becomes", "changes"),
    "grow": ("grow", "grows", "grew", "growing"),
    "shrink": ("shrink", "shrinks", "shrank", "shrinking"),
}
DETAILS = {"move": DIRECTIONS, "turn": (*COLORS, *SHAPES)}
"""Words that may follow a verb."""

VERB_OF = {form: verb for verb, forms in VERBS.items() for form in forms}
PHRASES = {"shows up": "appears", "goes away": "disappears", "goes": "moves"}  # tried in this order

SENTENCE_END = re.compile(r"[.;!?\n]+(?=\s|$)")
TOKEN = re.compile(r"[\"“«]([^\"“”«»]*)[\"”»]|\b([A-Z0-9]{2,}|\d+)\b|(\w+)")


@dataclass
class _Fact:
    """One statement: an object or a text, its place, and its events."""

    thing: str
    place: tuple[str, ...] = ()
    events: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        place = f" @ {place_name(self.place)}" if self.place else ""
        return f"{self.thing}{place}{''.join(f' | {event}' for event in self.events)}"


def content(text: str) -> tuple[str, ...]:
    """The statements of `text`, in order: one line such as "small red star @ top left" per object, text or event."""
    facts: list[str] = []
    for sentence in _sentences(text):
        facts += _facts(sentence)
    return tuple(facts)


def place_name(words: Iterable[str]) -> str:
    """Rows before columns; the middle of both is "center"."""
    words = set(words)
    row = next((w for w in ("top", "bottom") if w in words), "")
    column = next((w for w in ("left", "right") if w in words), "")
    if row and column:
        return f"{row} {column}"
    if row:
        return f"{row} center" if words & {"center", "middle"} else row
    if column:
        return f"middle {column}" if words & {"center", "middle"} else column
    return "center"


def _sentences(text: str) -> list[str]:
    """Cut at full stops and the like, though not inside quotation marks."""
    hidden = re.sub(r"[\"“«][^\"“”«»]*[\"”»]", lambda m: "_" * len(m.group()), text)
    ends = [m.end() for m in SENTENCE_END.finditer(hidden)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if text[a:b].strip()]


def _facts(sentence: str) -> list[str]:
    """The facts of one sentence."""
    reading = _Reading()
    for word, is_text in _words(sentence):
        reading.read(word, is_text)
    return [str(fact) for fact in reading.facts]


@dataclass
class _Reading:
    """A sentence, read up to some word.

    Attributes:
        attributes: Sizes and colors since the last thing.
        place_ahead, verb_ahead: Words that come before the thing they belong to.
        places_come_first: Whether the sentence began with a place; None before the first one.
        awaiting: The verb whose direction or new color may come next.
        in_place: Whether the word before belongs to a place.
    """

    facts: list[_Fact] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    place_ahead: list[str] = field(default_factory=list)
    verb_ahead: str = ""
    places_come_first: bool | None = None
    awaiting: str = ""
    in_place: bool = False

    def read(self, word: str, is_text: bool) -> None:
        in_place, self.in_place = self.in_place, False
        if not is_text and word in DETAILS.get(self.awaiting, ()):
            self.facts[-1].events[-1] += f" {word}"
            self.awaiting = ""
        elif is_text or word in SHAPES:
            self._thing(word, is_text)
        elif word in VERB_OF:
            self._verb(VERB_OF[word])
        elif word in PLACES:
            self.in_place = True
            self._place(word, in_place)
        elif word in COLORS or word in SIZES:
            self.attributes.append(word)

    def _thing(self, word: str, is_text: bool) -> None:
        sizes = [a for a in self.attributes if a in SIZES and not is_text]
        colors = sorted(a for a in self.attributes if a in COLORS)
        name = " ".join([*sizes, *colors, f'"{word}"' if is_text else word])
        self.facts.append(_Fact(name, tuple(self.place_ahead), [self.verb_ahead] if self.verb_ahead else []))
        self.attributes, self.place_ahead, self.verb_ahead, self.awaiting = [], [], "", ""

    def _verb(self, verb: str) -> None:
        if self.facts:
            self.facts[-1].events.append(verb)
            self.awaiting = verb
        else:
            self.verb_ahead = verb

    def _place(self, word: str, in_place: bool) -> None:
        if self.places_come_first is None:
            self.places_come_first = not self.facts
        if self.places_come_first:
            self.place_ahead = [*self.place_ahead, word] if in_place else [word]
        else:
            self.facts[-1].place += (word,)


def _words(sentence: str) -> Iterable[tuple[str, bool]]:
    """Known words of a sentence and, marked as such, its texts."""
    for phrase, verb in PHRASES.items():
        sentence = re.sub(rf"\b{phrase}\b", verb, sentence)
    for match in TOKEN.finditer(sentence):
        quoted, capitals, word = match.groups()
        if quoted is not None or capitals is not None:
            yield (quoted if quoted is not None else capitals).strip(), True
            continue
        word = word.casefold()
        word = SYNONYMS.get(word, word)
        singular = word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
        yield (singular if singular in SHAPES else word), False
