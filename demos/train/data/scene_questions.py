"""Questions and true answers on one scene. Yes and no are balanced, and most "no" to "is there a red star?" are asked
where something red and some star are both present."""

import numpy as np

from demos.train.data.asking import PLURALS, Asker, Composer, Focus, Question, alone, with_article
from demos.train.data.labels import bar_patches, patch_at, thing_patches
from demos.train.data.things import COLORS, ROWS, SHAPES, Bar, Scene, Text, cell_name

RELATIONS = {  # (rows, columns) that the first is ahead, and ways to say it
    "left of": (0, -1),
    "to the left of": (0, -1),
    "right of": (0, 1),
    "to the right of": (0, 1),
    "above": (-1, 0),
    "higher than": (-1, 0),
    "below": (1, 0),
    "lower than": (1, 0),
    "under": (1, 0),
}
TEXT_NOUNS = ("text", "text", "writing", "string")
DISPLAY_NOUNS = ("display", "display", "counter", "screen", "panel")
OBJECT_NOUNS = ("objects", "objects", "things", "shapes", "figures")


class SceneAsker(Asker):
    """Asks about one scene. Every ask_* draws a question of its kind, or gives None where the scene allows none."""

    def __init__(self, scene: Scene, rng: np.random.Generator, *, unseen: bool = False) -> None:
        super().__init__(rng, unseen=unseen)
        self.scene, self.things = scene, scene.things
        self.patches: list[Focus] = [tuple(int(p) for p in thing_patches(t)) for t in scene.things]
        self.characters: list[Focus] = [self.spots(text) for text in scene.texts]
        self.bars = scene.chart.bars if scene.chart else ()

    def spots(self, text: Text) -> Focus:
        """The patch of each character."""
        return tuple(patch_at(*center) for center in text.centers)

    def marked(self) -> set[int]:
        """All patches that some question may be about."""
        found = {p for patches in self.patches for p in patches}
        found |= {p for text in self.scene.all_texts for p in self.spots(text)}
        return found | {int(p) for bar in self.bars for p in bar_patches(bar)}

    # ── names ──

    def reference(self, i: int, *, plain: float = 0.6) -> str:
        """A name of thing i that fits no other: its shape where that is enough (mostly), else color and shape."""
        thing = self.things[i]
        if len(self.things) == 1 and self.chance(0.3):
            return self.pick(("object", "thing", "figure", "shape"))
        return thing.shape if i in alone(self.things, "shape") and self.chance(plain) else thing.name

    def text_reference(self, i: int) -> str:
        """ "text", or what distinguishes it from the other texts: its color or its cell."""
        text, noun = self.scene.texts[i], self.pick(TEXT_NOUNS)
        if len(self.scene.texts) == 1 and self.chance(0.6):
            return noun
        if self.chance(0.6):
            return f"{text.color} {noun}"
        place = ROWS[text.row]
        return f"{place} {noun}" if self.chance(0.5) else f"{noun} {'in' if place == 'middle' else 'at'} the {place}"

    # ── one word ──

    def ask_color(self) -> Question | None:
        if len(self.scene.texts) == 1 and self.chance(0.1):
            text = self.scene.texts[0]
            return Question("color", self.word("color", self.pick(TEXT_NOUNS)), text.color, self.characters[0])
        if not (choices := alone(self.things, "shape")):
            return None
        i = self.pick(choices)
        reference = self.reference(i, plain=1.0)
        return Question("color", self.word("color", reference), self.things[i].color, self.patches[i])

    def ask_shape(self) -> Question | None:
        if not (choices := alone(self.things, "color")):
            return None
        i = self.pick(choices)
        return Question("shape", self.word("shape", self.things[i].color), self.things[i].shape, self.patches[i])

    def ask_size(self) -> Question | None:
        if not self.things:
            return None
        i = int(self.rng.integers(len(self.things)))
        return Question("size", self.word("size", self.reference(i)), self.things[i].size, self.patches[i])

    def ask_where(self) -> Question | None:
        texts = self.scene.texts
        if texts and (not self.things or self.chance(0.12)):
            i = int(self.rng.integers(len(texts)))
            reference = "text" if len(texts) == 1 else f"{texts[i].color} text"
            place = cell_name(texts[i].row, texts[i].column)
            return Question("where", self.word("where", reference), place, self.characters[i])
        if not self.things:
            return None
        i = int(self.rng.integers(len(self.things)))
        place = cell_name(self.things[i].row, self.things[i].column)
        return Question("where", self.word("where", self.reference(i)), place, self.patches[i])

    def ask_exist(self) -> Question | None:
        if not self.things:
            return None
        colors, shapes = ([getattr(t, a) for t in self.things] for a in ("color", "shape"))
        if self.chance(0.5):
            i = int(self.rng.integers(len(self.things)))
            return Question("exist", self.word("exist", with_article(self.things[i].name)), "yes", self.patches[i])
        names = {t.name for t in self.things}
        binding = [f"{c} {s}" for c in dict.fromkeys(colors) for s in dict.fromkeys(shapes) if f"{c} {s}" not in names]
        if binding and self.chance(0.7):
            return Question("exist", self.word("exist", with_article(self.pick(binding))), "no")
        while (name := f"{self.pick(list(COLORS))} {self.pick(SHAPES)}") in names:
            pass
        return Question("exist", self.word("exist", with_article(name)), "no")

    def ask_relation(self) -> Question | None:
        """Yes or no, on two things that differ in the asked direction, the answer drawn first."""
        relation = self.pick(list(RELATIONS))
        rows, columns = RELATIONS[relation]
        pairs = [
            (i, j)
            for i, a in enumerate(self.things)
            for j, b in enumerate(self.things)
            if (a.row - b.row) * rows + (a.column - b.column) * columns > 0
        ]
        if not pairs:
            return None
        i, j = self.pick(pairs)
        answer = "yes"
        if self.chance(0.5):
            (i, j), answer = (j, i), "no"
        text = self.word("relation", self.reference(i), relation, self.reference(j))
        return Question("relation", text, answer, self.patches[i], self.patches[j])

    def ask_count(self) -> Question:
        objects = self.pick(OBJECT_NOUNS)
        noun, matching = objects, list(range(len(self.things)))
        if self.things and self.chance(0.6):
            of_shape, present = self.chance(0.5), self.chance(0.85)
            if of_shape:
                shape = self.pick([t.shape for t in self.things] if present else SHAPES)
                noun, matching = PLURALS[shape], [i for i, t in enumerate(self.things) if t.shape == shape]
            else:
                color = self.pick([t.color for t in self.things] if present else list(COLORS))
                noun, matching = f"{color} {objects}", [i for i, t in enumerate(self.things) if t.color == color]
        focus = tuple(p for i in matching for p in self.patches[i])
        return Question("count", self.word("count", noun), str(len(matching)), focus)

    def ask_name(self) -> Question | None:
        if len(self.things) != 1 or self.scene.all_texts:
            return None
        return Question("name", self.word("name"), self.things[0].name, self.patches[0])

    # ── reading ──

    def ask_read(self) -> Question | None:
        if not self.scene.texts:
            return None
        i = int(self.rng.integers(len(self.scene.texts)))
        if len(self.scene.all_texts) == 1 and self.chance(0.4):
            text = self.word("read only")
        else:
            text = self.word("read", self.text_reference(i))
        return Composer().spell(self.scene.texts[i].string, self.characters[i]).question("read", text)

    def ask_number(self) -> Question | None:
        """What a display shows."""
        display = self.scene.display
        if not display:
            return None
        text = self.word("number", self.pick(DISPLAY_NOUNS))
        return Composer().spell(display.string, self.spots(display)).question("number", text)

    def ask_chart(self) -> Question | None:
        if not self.bars:
            return None
        kind = self.pick(("highest", "lowest", "value", "value", "bars"))
        if kind == "bars":
            focus = tuple(int(p) for bar in self.bars for p in bar_patches(bar))
            return Question("chart", self.word("bars"), str(len(self.bars)), focus)
        if kind == "value":
            bar = self.pick(self.bars)
            reference = f"{bar.color} bar"
            if bar.label_text and self.chance(0.3):
                reference = self.pick((f"bar {bar.label_text.string}", f"bar labeled {bar.label_text.string}"))
            assert bar.value_text is not None
            digits = self.spots(bar.value_text)
            return Composer().spell(bar.value_text.string, digits).question("chart", self.word("value", reference))
        bar = (max if kind == "highest" else min)(self.bars, key=lambda b: b.value)
        return Question("chart", self.word(kind), bar.color, tuple(int(p) for p in bar_patches(bar)))

    # ── descriptions ──

    def ask_list(self) -> Question | None:
        """red star, blue circle"""
        if not self.things:
            return None
        composer = Composer()
        for thing, patches in zip(self.things, self.patches, strict=True):
            composer.add(f"{', ' if composer.answer else ''}{thing.name}", patches)
        return composer.question("list", self.word("list"))

    def ask_tour(self) -> Question | None:
        """At the top left there is a small red star. ... At the bottom center it says "K7PX"."""
        if not self.things and not self.scene.texts:
            return None
        return self.describe(2).question("tour", self.word("tour"))

    def ask_caption(self) -> Question:
        """Objects in reading order, then texts, then display and chart, in one of several styles."""
        return self.describe(int(self.rng.choice(4, p=(0.4, 0.2, 0.2, 0.2)))).question("caption", self.word("caption"))

    def describe(self, style: int) -> Composer:
        composer = Composer()
        starts = (("A", " A"), ("There is a", ", a"), ("At the", " At the"), ("The image shows a", ", a"))[style]
        closed = style in (0, 2)
        for i, (thing, patches) in enumerate(zip(self.things, self.patches, strict=True)):
            place, start = cell_name(thing.row, thing.column), starts[min(i, 1)]
            if style == 0:
                composer.add(f"{start} {thing.size} {thing.name} is at the {place}.", patches)
            elif style == 2:
                composer.add(f"{start} {place} there is a {thing.size} {thing.name}.", patches)
            else:
                composer.add(f"{start} {thing.size} {thing.name} at the {place}", patches)
        if self.things and not closed:
            composer.add(".", self.patches[-1])
        for text, characters in zip(self.scene.texts, self.characters, strict=True):
            self.quote(composer, style, text, characters)
        if self.scene.display:
            spots = self.spots(self.scene.display)
            composer.add(f"{' ' if composer.answer else ''}The display shows ", spots)
            composer.spell(self.scene.display.string, spots).add(".", spots)
        self.describe_bars(composer)
        return composer

    def quote(self, composer: Composer, style: int, text: Text, characters: Focus) -> None:
        place, space = cell_name(text.row, text.column), " " if composer.answer else ""
        if style == 2:
            composer.add(f'{space}At the {place} it says "', characters)
            composer.spell(text.string, characters).add('".', characters)
            return
        composer.add(f'{space}The {text.color} text "', characters)
        composer.spell(text.string, characters).add(f'" is at the {place}.', characters)

    def describe_bars(self, composer: Composer) -> None:
        """A bar chart shows red 12, blue 4."""
        for i, bar in enumerate(self.bars):
            spots = self.spots(bar.value_text) if bar.value_text else ()
            start = f"{' ' if composer.answer else ''}A bar chart shows " if i == 0 else ", "
            composer.add(f"{start}{bar.color} ", bar_focus(bar)).spell(str(bar.value), spots)
        if self.bars:
            composer.add(".", bar_focus(self.bars[-1]))


def bar_focus(bar: Bar) -> Focus:
    return tuple(int(p) for p in bar_patches(bar))


SHORT_KINDS = ("color", "shape", "size", "where", "exist", "relation", "count")
SCENE_KINDS = (*SHORT_KINDS, "name", "chart", "number", "read", "caption", "tour", "list")
