"""Questions and true answers on scenes and clips, in several wordings, with where in the picture each answer is found.

The last wording of each kind is never used in training (`unseen=True` asks with it). Yes and no are balanced, and most
"no" to "is there a red star?" are asked where something red and some star are both present.

`focus` names the visual tokens an answer token is read from: the training's attention loss needs them, nothing else
does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from demos.train.data.clips import Clip, Event
from demos.train.data.scenes import (
    COLORS,
    COLUMNS,
    GRID,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    cell_name,
    patch_at,
    thing_patches,
)

POOL = 2  # clip frames are pooled 2x2
FRAME_TOKENS = (GRID // POOL) ** 2

WORDINGS = {
    "color": (
        "What color is the {}?",
        "What is the color of the {}?",
        "Which color does the {} have?",
        "What colour is the {}?",
        "Name the color of the {}.",
        "The {} has which color?",
    ),
    "shape": (
        "What shape is the {} object?",
        "What is the shape of the {} object?",
        "Which shape is {}?",
        "What is the {} thing?",
        "Name the shape of the {} object.",
        "The {} object has which shape?",
    ),
    "size": (
        "What size is the {}?",
        "How big is the {}?",
        "Is the {} small or large?",
        "What is the size of the {}?",
        "Is the {} large or small?",
    ),
    "where": (
        "Where is the {}?",
        "In which part of the image is the {}?",
        "What is the position of the {}?",
        "Where do you see the {}?",
        "Where can the {} be found?",
    ),
    "exist": (
        "Is there {}?",
        "Does the image show {}?",
        "Can you see {}?",
        "Is {} in the image?",
        "Do you see {}?",
    ),
    "relation": (
        "Is the {} {} the {}?",
        "Is the {} located {} the {}?",
        "Does the {} lie {} the {}?",
        "Can the {} be found {} the {}?",
    ),
    "count": (
        "How many {} are there?",
        "Count the {}.",
        "How many {} do you see?",
        "What is the number of {}?",
        "How many {} does the image show?",
    ),
    "read": (
        "What does the {} say?",
        "Read the {}.",
        "Which characters are in the {}?",
        "What is written in the {}?",
        "Spell the {}.",
    ),
    "caption": (
        "Describe the image.",
        "What is in this image?",
        "Give a detailed description.",
        "What do you see?",
        "Please describe this picture.",
    ),
    "tour": (
        "What is where in the image?",
        "Say what is in each place.",
        "Go through the image from top to bottom.",
        "Describe the image place by place.",
    ),
    "list": (
        "List the objects.",
        "Name all objects.",
        "Which objects are in the image?",
        "List everything you see.",
    ),
    "happens": (
        "What happens in the video?",
        "What happens?",
        "Describe the video.",
        "What is going on in this clip?",
        "Tell what happens in the clip.",
    ),
    "direction": (
        "Which way does the {} move?",
        "In which direction does the {} move?",
        "Where does the {} go?",
        "The {} moves in which direction?",
    ),
    "appears": ("What appears?", "Which object appears in the video?", "What shows up?", "Which object shows up?"),
    "vanishes": ("What disappears?", "Which object disappears?", "What goes away?", "Which object goes away?"),
    "first": ("What happens first?", "What is the first event?", "What happens before the rest?", "What comes first?"),
    "last": ("What happens last?", "What is the last event?", "What happens at the end?", "What comes last?"),
}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)
PLURALS = {s: f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES}

Focus = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Characters start..stop of an answer are read from focus (in clips: before the event) and other (after it)."""

    start: int
    stop: int
    focus: Focus
    other: Focus = ()


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    focus: visual tokens of the asked thing (all matching ones for a count, none if nothing matches).
    other: those of the second thing of a relation, or of the moment an event is over.
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
        self.spans.append(Span(len(self.answer), len(self.answer) + len(piece), focus, other))
        self.answer += piece
        return self

    def question(self, kind: str, text: str) -> Question:
        return Question(kind, text, self.answer, spans=tuple(self.spans))


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def word(rng: np.random.Generator, kind: str, unseen: bool) -> str:
    wordings = WORDINGS[kind]
    return wordings[-1] if unseen else wordings[rng.integers(len(wordings) - 1)]


# ── scenes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class SceneAsker:
    """Asks about one scene. Every ask_* draws a question of its kind, or gives None where the scene allows none."""

    def __init__(self, scene: Scene, rng: np.random.Generator, *, unseen: bool = False) -> None:
        self.scene, self.rng, self.unseen = scene, rng, unseen
        self.things = scene.things
        self.patches: list[Focus] = [tuple(int(p) for p in thing_patches(t)) for t in scene.things]
        self.characters: list[Focus] = [tuple(patch_at(*c) for c in t.centers) for t in scene.texts]

    def word(self, kind: str, *parts: str) -> str:
        return word(self.rng, kind, self.unseen).format(*parts)

    def pick(self, items: list) -> object:
        return items[self.rng.integers(len(items))]

    def alone(self, attribute: str) -> list[int]:
        """Things that are the only one with their value of an attribute."""
        values = [getattr(t, attribute) for t in self.things]
        return [i for i, value in enumerate(values) if values.count(value) == 1]

    def reference(self, i: int, *, plain: float = 0.6) -> str:
        """A name of thing i that fits no other: its shape where that is enough (mostly), else color and shape."""
        return self.things[i].shape if i in self.alone("shape") and self.rng.random() < plain else self.things[i].name

    def text_reference(self, i: int) -> str:
        """ "text", or what tells it from the other text: its color or its place."""
        text = self.scene.texts[i]
        if len(self.scene.texts) == 1:
            return "text" if self.rng.random() < 0.7 else f"{text.color} text"
        return f"{text.color} text" if self.rng.random() < 0.7 else f"{('top', 'bottom')[i]} text"

    def ask_color(self) -> Question | None:
        if self.scene.texts and self.rng.random() < 0.1 and len(self.scene.texts) == 1:
            return Question("color", self.word("color", "text"), self.scene.texts[0].color, self.characters[0])
        if not (choices := self.alone("shape")):
            return None
        i = self.pick(choices)
        return Question("color", self.word("color", self.things[i].shape), self.things[i].color, self.patches[i])

    def ask_shape(self) -> Question | None:
        if not (choices := self.alone("color")):
            return None
        i = self.pick(choices)
        return Question("shape", self.word("shape", self.things[i].color), self.things[i].shape, self.patches[i])

    def ask_size(self) -> Question:
        i = int(self.rng.integers(len(self.things)))
        return Question("size", self.word("size", self.reference(i)), self.things[i].size, self.patches[i])

    def ask_where(self) -> Question:
        if self.scene.texts and self.rng.random() < 0.1:
            i = int(self.rng.integers(len(self.scene.texts)))
            text = self.scene.texts[i]
            reference = "text" if len(self.scene.texts) == 1 else f"{text.color} text"
            return Question(
                "where", self.word("where", reference), cell_name(text.row, text.column), self.characters[i]
            )
        i = int(self.rng.integers(len(self.things)))
        thing = self.things[i]
        return Question(
            "where", self.word("where", self.reference(i)), cell_name(thing.row, thing.column), self.patches[i]
        )

    def ask_exist(self) -> Question:
        colors, shapes = ([getattr(t, a) for t in self.things] for a in ("color", "shape"))
        if self.rng.random() < 0.5:
            i = int(self.rng.integers(len(self.things)))
            return Question("exist", self.word("exist", with_article(self.things[i].name)), "yes", self.patches[i])
        names = {t.name for t in self.things}
        binding = [f"{c} {s}" for c in dict.fromkeys(colors) for s in dict.fromkeys(shapes) if f"{c} {s}" not in names]
        if binding and self.rng.random() < 0.7:
            return Question("exist", self.word("exist", with_article(self.pick(binding))), "no")
        while (name := f"{self.pick(list(COLORS))} {self.pick(list(SHAPES))}") in names:
            pass
        return Question("exist", self.word("exist", with_article(name)), "no")

    def ask_relation(self) -> Question | None:
        """Yes or no, on two things that differ in the asked direction, the answer drawn first."""
        relation = self.pick(list(RELATIONS))
        rows, columns = RELATIONS[relation]
        ahead = lambda a, b: (a.row - b.row) * rows + (a.column - b.column) * columns  # noqa: E731
        pairs = [(i, j) for i, a in enumerate(self.things) for j, b in enumerate(self.things) if ahead(a, b) > 0]
        if not pairs:
            return None
        i, j = self.pick(pairs)
        answer = "yes"
        if self.rng.random() < 0.5:
            (i, j), answer = (j, i), "no"
        text = self.word("relation", self.reference(i), relation, self.reference(j))
        return Question("relation", text, answer, self.patches[i], self.patches[j])

    def ask_count(self) -> Question:
        noun, matching = "objects", list(range(len(self.things)))
        if self.rng.random() < 0.6:
            of_shape, present = self.rng.random() < 0.5, self.rng.random() < 0.85
            if of_shape:
                shape = self.pick([t.shape for t in self.things] if present else list(SHAPES))
                noun, matching = PLURALS[shape], [i for i, t in enumerate(self.things) if t.shape == shape]
            else:
                color = self.pick([t.color for t in self.things] if present else list(COLORS))
                noun, matching = f"{color} objects", [i for i, t in enumerate(self.things) if t.color == color]
        focus = tuple(p for i in matching for p in self.patches[i])
        return Question("count", self.word("count", noun), str(len(matching)), focus)

    def ask_read(self) -> Question | None:
        if not self.scene.texts:
            return None
        i = int(self.rng.integers(len(self.scene.texts)))
        composer = Composer()
        for character, patch in zip(self.scene.texts[i].string, self.characters[i], strict=True):
            composer.add(character, (patch,))
        return composer.question("read", self.word("read", self.text_reference(i)))

    def ask_caption(self) -> Question:
        """A small red star is at the top left. ... The text "K7PX" is at the bottom center."""
        composer = Composer()
        for thing, patches in zip(self.things, self.patches, strict=True):
            place = cell_name(thing.row, thing.column)
            composer.add(
                f"{'A' if not composer.answer else ' A'} {thing.size} {thing.name} is at the {place}.", patches
            )
        return self.add_texts(composer, ' The text "', '" is at the {}.').question("caption", self.word("caption"))

    def ask_tour(self) -> Question:
        """At the top left there is a small red star. ... At the bottom center it says "K7PX"."""
        composer = Composer()
        for thing, patches in zip(self.things, self.patches, strict=True):
            place = cell_name(thing.row, thing.column)
            start = "At" if not composer.answer else " At"
            composer.add(f"{start} the {place} there is a {thing.size} {thing.name}.", patches)
        for text, characters in zip(self.scene.texts, self.characters, strict=True):
            composer.add(f' At the {cell_name(text.row, text.column)} it says "', characters)
            self.spell(composer, text.string, characters).add('".', characters)
        return composer.question("tour", self.word("tour"))

    def ask_list(self) -> Question:
        """red star, blue circle"""
        composer = Composer()
        for thing, patches in zip(self.things, self.patches, strict=True):
            composer.add(f"{', ' if composer.answer else ''}{thing.name}", patches)
        return composer.question("list", self.word("list"))

    def add_texts(self, composer: Composer, before: str, after: str) -> Composer:
        for text, characters in zip(self.scene.texts, self.characters, strict=True):
            composer.add(before, characters)
            self.spell(composer, text.string, characters).add(
                after.format(cell_name(text.row, text.column)), characters
            )
        return composer

    def spell(self, composer: Composer, string: str, characters: Focus) -> Composer:
        for character, patch in zip(string, characters, strict=True):
            composer.add(character, (patch,))
        return composer

    def ask(self, kind: str) -> Question | None:
        asker: Callable[[], Question | None] = getattr(self, f"ask_{kind}")
        return asker()


SCENE_KINDS = ("color", "shape", "size", "where", "exist", "relation", "count", "read", "caption", "tour", "list")
SHORT_KINDS = SCENE_KINDS[:7]


# ── clips ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ClipAsker:
    """Asks about one clip; tokens are those of all frames one after the other, FRAME_TOKENS each."""

    def __init__(self, clip: Clip, rng: np.random.Generator, *, unseen: bool = False) -> None:
        self.clip, self.rng, self.unseen = clip, rng, unseen

    def word(self, kind: str, *parts: str) -> str:
        return word(self.rng, kind, self.unseen).format(*parts)

    def tokens(self, i: int, frame: int) -> Focus:
        """Pooled tokens of thing i in a frame; where it is or would be if it is not to be seen there."""
        thing = self.clip.things_at(frame)[i] or self.clip.things[i]
        pooled = {(int(p) // GRID // POOL) * (GRID // POOL) + int(p) % GRID // POOL for p in thing_patches(thing)}
        return tuple(frame * FRAME_TOKENS + token for token in sorted(pooled))

    def moments(self, event: Event) -> tuple[Focus, Focus]:
        """Tokens of an event's thing in the frames before and after it happens."""
        return self.tokens(event.thing, event.start), self.tokens(event.thing, event.stop)

    def sentence(self, event: Event) -> str:
        thing = self.clip.things[event.thing]
        if event.kind == "move":
            return f"The {thing.name} moves {event.detail}."
        if event.kind == "change":
            return f"The {thing.name} turns {event.detail}."
        if event.kind == "disappear":
            return f"The {thing.name} disappears."
        return f"{with_article(thing.name).capitalize()} appears."

    def narrate(self, kind: str, events: list[Event]) -> Question:
        composer, pairs = Composer(), [self.moments(e) for e in events]
        for event, (before, after) in zip(events, pairs, strict=True):
            composer.add(f"{' ' if composer.answer else ''}{self.sentence(event)}", before, after)
        return composer.question(kind, self.word(kind))

    def ask_happens(self) -> Question:
        return self.narrate("happens", list(self.clip.events))

    def ask_first(self) -> Question | None:
        return self.narrate("first", [self.clip.events[0]]) if len(self.clip.events) > 1 else None

    def ask_last(self) -> Question | None:
        return self.narrate("last", [self.clip.events[-1]]) if len(self.clip.events) > 1 else None

    def ask_direction(self) -> Question | None:
        moves = [e for e in self.clip.events if e.kind == "move"]
        if not moves:
            return None
        event = moves[self.rng.integers(len(moves))]
        text = self.word("direction", self.clip.things[event.thing].shape)
        return Question("direction", text, event.detail, *self.moments(event))

    def ask_appears(self) -> Question | None:
        return self.name_one("appears", "appear")

    def ask_vanishes(self) -> Question | None:
        return self.name_one("vanishes", "disappear")

    def name_one(self, kind: str, event_kind: str) -> Question | None:
        events = [e for e in self.clip.events if e.kind == event_kind]
        if len(events) != 1:
            return None
        before, after = self.moments(events[0])
        name = self.clip.things[events[0].thing].name
        return Composer().add(name, before, after).question(kind, self.word(kind))

    def still(self) -> list[int]:
        """Things to which nothing happens; they look the same in every frame."""
        return [i for i in range(len(self.clip.things)) if i not in {e.thing for e in self.clip.events}]

    def ask_color(self) -> Question | None:
        return self.about_still("color", lambda t: t.color)

    def ask_where(self) -> Question | None:
        return self.about_still("where", lambda t: cell_name(t.row, t.column))

    def about_still(self, kind: str, answer: Callable[[Thing], str]) -> Question | None:
        if not (still := self.still()):
            return None
        i = still[self.rng.integers(len(still))]
        thing = self.clip.things[i]
        focus = tuple(t for frame in range(self.clip.num_frames) for t in self.tokens(i, frame))
        return Question(kind, self.word(kind, thing.shape), answer(thing), focus)

    def ask(self, kind: str) -> Question | None:
        asker: Callable[[], Question | None] = getattr(self, f"ask_{kind}")
        return asker()


CLIP_KINDS = ("happens", "first", "last", "direction", "appears", "vanishes", "color", "where")


def answer_words() -> list[str]:
    """Every word that answers are made of, apart from the characters of texts: each is to be one token."""
    words = [
        *COLORS,
        *SHAPES,
        *SIZES,
        *ROWS,
        *COLUMNS,
        "yes",
        "no",
        *map(str, range(10)),
        "up",
        "down",
        "left",
        "right",
    ]
    words += ["A", "An", "The", "At", "a", "the", "at", "is", "there", "it", "says", "text", "object"]
    return [*dict.fromkeys([*words, "moves", "turns", "appears", "disappears", "none"])]
