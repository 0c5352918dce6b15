"""Questions and true answers on one clip; visual tokens are those of all frames one after the other."""

from collections.abc import Callable

import numpy as np

from demos.train.data.asking import Asker, Composer, Focus, Question, with_article
from demos.train.data.clips import KINDS, Clip, Event
from demos.train.data.labels import patch_at, thing_patches
from demos.train.data.things import GRID, Thing, cell_name

POOL = 2  # clip frames are pooled 2x2
FRAME_TOKENS = (GRID // POOL) ** 2
EVENT_KINDS = (*KINDS, "text")


def pooled(patches: tuple[int, ...]) -> list[int]:
    """Tokens of a frame that hold the patches, each once, in the order of the patches."""
    return list(dict.fromkeys((p // GRID // POOL) * (GRID // POOL) + p % GRID // POOL for p in patches))


class ClipAsker(Asker):
    """Asks about one clip. Every ask_* draws a question of its kind, or gives None where the clip allows none."""

    video = True

    def __init__(self, clip: Clip, rng: np.random.Generator, *, unseen: bool = False) -> None:
        super().__init__(rng, unseen=unseen)
        self.clip = clip

    def tokens(self, i: int, frame: int) -> Focus:
        """Pooled tokens of thing i in a frame; where it is or would be if it is not to be seen there."""
        thing = self.clip.things_at(frame)[i] or self.clip.things[i]
        return self.in_frame(frame, tuple(int(p) for p in thing_patches(thing)))

    def in_frame(self, frame: int, patches: Focus) -> Focus:
        return tuple(frame * FRAME_TOKENS + token for token in sorted(pooled(patches)))

    def letters(self, frame: int) -> Focus:
        """The token of each character of the text in a frame."""
        text = self.clip.text_at(frame)
        assert text is not None
        return tuple(frame * FRAME_TOKENS + pooled((patch_at(*c),))[0] for c in text.centers)

    def marked(self) -> set[int]:
        """Pooled cells that some question may be about, in any frame."""
        spots = {t for f in set(self.clip.states()) for i in range(len(self.clip.things)) for t in self.tokens(i, f)}
        if self.clip.text:
            spots |= {t for f in (0, self.clip.num_frames - 1) for t in self.letters(f)}
        return {t % FRAME_TOKENS for t in spots}

    def moments(self, event: Event) -> tuple[Focus, Focus]:
        """Tokens of what an event happens to, when it has just happened and just before."""
        if event.kind == "text":
            return self.letters(event.after_frame), self.letters(event.before_frame)
        return self.tokens(event.thing, event.after_frame), self.tokens(event.thing, event.before_frame)

    def changes(self) -> list[tuple[int, int, int]]:
        """(visual token, index of the kind in EVENT_KINDS, index of the event) where a frame differs from the last."""
        found = []
        for order, event in enumerate(self.clip.events):
            for frame in range(event.before_frame + 1, event.after_frame + 1):
                if event.kind == "text":
                    spots = {t % FRAME_TOKENS for f in (frame - 1, frame) for t in self.letters(f)}
                else:
                    spots = {t % FRAME_TOKENS for f in (frame - 1, frame) for t in self.tokens(event.thing, f)}
                found += [(frame * FRAME_TOKENS + t, EVENT_KINDS.index(event.kind), order) for t in sorted(spots)]
        return found

    # ── events ──

    def sentence(self, event: Event) -> str:
        thing = self.clip.things[event.thing]
        verbs = {"move": "moves", "disappear": "disappears", "color": "turns", "size": "", "shape": "becomes"}
        if event.kind == "appear":
            return f"{with_article(thing.name).capitalize()} appears."
        detail = {"disappear": "", "shape": f" {with_article(event.detail)}" if event.detail else ""}
        verb = event.detail if event.kind == "size" else verbs[event.kind]
        tail = "" if event.kind == "size" else detail.get(event.kind, f" {event.detail}")
        return f"The {thing.name} {verb}{tail}."

    def describe(self, composer: Composer, event: Event) -> None:
        after, before = self.moments(event)
        space = " " if composer.answer else ""
        if event.kind != "text":
            composer.add(f"{space}{self.sentence(event)}", after, before)
            return
        composer.add(f'{space}The text changes from "', after, before)
        old, new = self.clip.text_at(event.before_frame), self.clip.text_at(event.after_frame)
        assert old is not None
        assert new is not None
        composer.spell(old.string, before).add('" to "', after).spell(new.string, after).add('".', after)

    def narrate(self, kind: str, events: list[Event]) -> Question:
        composer = Composer()
        for event in events:
            self.describe(composer, event)
        return composer.question(kind, self.word(kind))

    def ask_happens(self) -> Question:
        return self.narrate("happens", list(self.clip.events))

    def ask_first(self) -> Question | None:
        return self.narrate("first", [self.clip.events[0]]) if len(self.clip.events) > 1 else None

    def ask_last(self) -> Question | None:
        return self.narrate("last", [self.clip.events[-1]]) if len(self.clip.events) > 1 else None

    def event_of(self, *kinds: str) -> Event | None:
        """The only event of these kinds."""
        events = [e for e in self.clip.events if e.kind in kinds]
        return events[0] if len(events) == 1 else None

    def ask_direction(self) -> Question | None:
        if not (event := self.event_of("move")):
            return None
        text = self.word("direction", self.clip.things[event.thing].shape)
        return Question("direction", text, event.detail, *self.moments(event))

    def ask_becomes(self) -> Question | None:
        if not (event := self.event_of("color")):
            return None
        text = self.word("becomes", self.clip.things[event.thing].shape)
        return Question("becomes", text, event.detail, *self.moments(event))

    def ask_appears(self) -> Question | None:
        return self.name_one("appears", "appear")

    def ask_vanishes(self) -> Question | None:
        return self.name_one("vanishes", "disappear")

    def name_one(self, kind: str, event_kind: str) -> Question | None:
        if not (event := self.event_of(event_kind)):
            return None
        after, before = self.moments(event)
        return Composer().add(self.clip.things[event.thing].name, after, before).question(kind, self.word(kind))

    def ask_text(self) -> Question | None:
        """What the text says before or after it changes."""
        if not (event := self.event_of("text")):
            return None
        at_end = self.chance(0.5)
        frame = event.after_frame if at_end else event.before_frame
        text = self.clip.text_at(frame)
        assert text is not None
        composer = Composer().spell(text.string, self.letters(frame))
        return composer.question("text", self.word("text end" if at_end else "text start"))

    # ── what stays ──

    def ask_color(self) -> Question | None:
        return self.about_still("color", lambda t: t.color)

    def ask_where(self) -> Question | None:
        return self.about_still("where", lambda t: cell_name(t.row, t.column))

    def about_still(self, kind: str, answer: Callable[[Thing], str]) -> Question | None:
        """About a thing to which nothing happens; it looks the same in every frame."""
        busy = {e.thing for e in self.clip.events if e.kind != "text"}
        if not (still := [i for i in range(len(self.clip.things)) if i not in busy]):
            return None
        thing = self.clip.things[i := self.pick(still)]
        focus = tuple(t for frame in range(self.clip.num_frames) for t in self.tokens(i, frame))
        return Question(kind, self.word(kind, thing.shape), answer(thing), focus)

    def ask_frames(self) -> Question | None:
        """How many frames show what appears or disappears."""
        if not (event := self.event_of("appear", "disappear")):
            return None
        seen = sum(self.clip.things_at(f)[event.thing] is not None for f in range(self.clip.num_frames))
        text = self.word("frames", self.clip.things[event.thing].name)
        return Question("frames", text, str(seen), *self.moments(event))


CLIP_KINDS = (
    *("happens", "first", "last", "direction", "becomes", "appears", "vanishes", "text"),
    *("frames", "color", "where"),
)
