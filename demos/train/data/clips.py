"""Clips: a seed gives a short film in which one or two things happen, one after the other.

Things stand in cells of the 3x3 grid as in a still scene, and some clips hold a text. An event moves a thing to a
neighbouring cell, lets it appear or disappear, changes its color, size or shape, or changes the text. Frames of one
clip share their ground and grain, so only events change pixels. Look at one:

    python -m demos.train.data.clips --seed 3 --out /tmp/clip.png
"""

import argparse
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from demos.train.data.drawing import draw_ground, finish, paste_thing, write_text
from demos.train.data.scenes import sample_thing
from demos.train.data.things import (
    CELL_PX,
    COLORS,
    FONTS,
    SHAPES,
    SIDE_PX,
    SIZES,
    WORDS,
    Text,
    Thing,
    jitter,
    sample_string,
)

NUM_FRAMES = (8, 16)
KINDS = {"move": 0.35, "appear": 0.17, "disappear": 0.17, "color": 0.15, "size": 0.08, "shape": 0.08}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
MOVE_FRAMES = (3, 5)
TEXT_SHARE, TEXT_EVENT_SHARE = 0.35, 0.7
TEXT_PX = (34, 42)  # pooled tokens are 28 px wide: about one character each
PLAIN_SHARE = 0.25


@dataclass(frozen=True)
class Event:
    """What happens to things[thing], or to the text.

    before_frame: the last without any change; after_frame: the first in which it is over (the next one, but for a
    move). detail: direction, new color or shape, or "grows". after: thing or text as it is then, None once disappeared.
    """

    kind: str
    thing: int
    before_frame: int
    after_frame: int
    detail: str = ""
    after: Thing | Text | None = None


@dataclass(frozen=True)
class Clip:
    """Things (and the text) as they are, or will appear, before anything happens, and the events in order of time."""

    seed: int
    num_frames: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    text: Text | None = None
    plain: bool = False

    def things_at(self, frame: int) -> list[Thing | None]:
        """Every thing as seen in a frame, None where it is not seen."""
        seen: list[Thing | None] = list(self.things)
        for event in self.events:
            if event.kind != "text":
                seen[event.thing] = thing_during(self.things[event.thing], event, frame)
        return seen

    def text_at(self, frame: int) -> Text | None:
        changes = [e for e in self.events if e.kind == "text" and frame >= e.after_frame]
        after = changes[-1].after if changes else self.text
        assert after is None or isinstance(after, Text)
        return after

    def states(self) -> list[int]:
        """For each frame, the first frame that looks the same."""
        first: dict[tuple, int] = {}
        looks = [(*self.things_at(frame), self.text_at(frame)) for frame in range(self.num_frames)]
        return [first.setdefault(look, frame) for frame, look in enumerate(looks)]


def thing_during(thing: Thing, event: Event, frame: int) -> Thing | None:
    over = frame >= event.after_frame
    if event.kind == "appear":
        return thing if over else None
    if event.kind == "disappear":
        return None if over else thing
    after = event.after
    assert isinstance(after, Thing)
    if event.kind != "move":
        return after if over else thing
    done = min(1.0, max(0.0, (frame - event.before_frame) / (event.after_frame - event.before_frame)))
    return replace(thing, x=thing.x + done * (after.x - thing.x), y=thing.y + done * (after.y - thing.y))


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_clip(seed: int, *, num_frames: int | None = None) -> Clip:
    """1-4 things of different shapes; one event, or two (by different things) in half of the clips."""
    rng = np.random.default_rng([4, seed])
    num_frames = int(rng.choice(np.arange(NUM_FRAMES[0], NUM_FRAMES[1] + 1, 2))) if num_frames is None else num_frames
    plain, num_events = bool(rng.random() < PLAIN_SHARE), int(rng.integers(1, 3))
    num_things = int(rng.integers(num_events, 5))
    text = sample_text(rng) if rng.random() < TEXT_SHARE else None
    free = [(row, column) for row in range(3) for column in range(3) if text is None or row != text.row]
    cells = [free[int(i)] for i in rng.permutation(len(free))[:num_things]]
    things: list[Thing] = []
    for cell in cells:
        while (thing := sample_thing(rng, *cell, things)).shape in {t.shape for t in things}:
            pass
        things.append(thing)
    text_event = int(rng.integers(num_events)) if text and rng.random() < TEXT_EVENT_SHARE else -1
    free = [cell for cell in free if cell not in cells]
    bounds = [round(i * (num_frames - 1) / num_events) for i in range(num_events + 1)]
    events = []
    for i, (low, high) in enumerate(pairwise(bounds)):  # events in order of time
        if i == text_event:
            assert text is not None
            after = int(rng.integers(low + 1, high + 1))
            events.append(Event("text", -1, after - 1, after, after=retype(rng, text)))
            continue
        events.append(sample_event(rng, i, things, cells, free, (low, high)))
    return Clip(seed, num_frames, tuple(things), tuple(events), text, plain)


def sample_event(
    rng: np.random.Generator,
    i: int,
    things: list[Thing],
    cells: list[tuple[int, int]],
    free: list[tuple[int, int]],
    frames: tuple[int, int],
) -> Event:
    """Something that happens to things[i] between two frames; a cell that is moved into is free no more."""
    thing = things[i]
    target = {d: (cells[i][0] + rows, cells[i][1] + columns) for d, (rows, columns) in DIRECTIONS.items()}
    room = [d for d in DIRECTIONS if target[d] in free]
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    while kind == "move" and not room:
        kind = str(rng.choice(list(KINDS)))
    if kind == "move":
        num_frames = min(int(rng.integers(MOVE_FRAMES[0], MOVE_FRAMES[1] + 1)), frames[1] - frames[0])
        before = int(rng.integers(frames[0], frames[1] - num_frames + 1))
        detail = str(rng.choice(room))
        free.remove(target[detail])
        rows, columns = DIRECTIONS[detail]
        moved = replace(thing, x=thing.x + columns * CELL_PX * 0.9, y=thing.y + rows * CELL_PX * 0.9)
        return Event(kind, i, before, before + num_frames, detail, moved)
    after = int(rng.integers(frames[0] + 1, frames[1] + 1))
    detail, changed = "", None
    if kind == "color":
        detail = str(rng.choice([c for c in COLORS if c != thing.color]))
        changed = replace(thing, color=detail, rgb=jitter(rng, detail))
    elif kind == "size":
        size = "small" if thing.size == "large" else "large"
        detail = "grows" if size == "large" else "shrinks"
        changed = replace(thing, size=size, radius=float(rng.integers(SIZES[size][0], SIZES[size][1] + 1)))
    elif kind == "shape":
        detail = str(rng.choice([s for s in SHAPES if s not in {t.shape for t in things}]))
        changed = replace(thing, shape=detail)
    return Event(kind, i, after - 1, after, detail, changed)


def sample_text(rng: np.random.Generator) -> Text:
    color, font, row = str(rng.choice(list(COLORS))), str(rng.choice(FONTS)), int(rng.integers(3))
    font_px, y = int(rng.integers(TEXT_PX[0], TEXT_PX[1] + 1)), (row + 0.5) * CELL_PX + rng.uniform(-8, 8)
    blank = Text(clip_string(rng), color, font, font_px, 0, y, jitter(rng, color))
    return replace(blank, x=rng.uniform(8, SIDE_PX - 8 - blank.width))


def retype(rng: np.random.Generator, text: Text) -> Text:
    """The same text with other characters, about the same middle."""
    while (string := clip_string(rng)) == text.string:
        pass
    other = replace(text, string=string)
    x = text.x + (text.width - other.width) / 2
    return replace(other, x=min(max(6.0, x), SIDE_PX - 6 - other.width))


def clip_string(rng: np.random.Generator) -> str:
    """2-4 characters, or a short word."""
    if rng.random() < 0.35:
        return str(rng.choice([w for w in WORDS if len(w) <= 4]))
    return sample_string(rng, int(rng.integers(2, 5)))


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_clip(clip: Clip, *, distinct: bool = False) -> np.ndarray:
    """The frames, uint8 (T, 224, 224, 3); distinct: only those that look like none before them."""
    in_use = [t.rgb for t in clip.things] + [e.after.rgb for e in clip.events if e.after]
    in_use += [clip.text.rgb] if clip.text else []
    ground = draw_ground(np.random.default_rng([5, clip.seed]), in_use, plain=clip.plain)
    drawn: dict[int, np.ndarray] = {}
    for frame in dict.fromkeys(clip.states()):
        image = ground.copy()
        for thing in clip.things_at(frame):
            if thing:
                paste_thing(image, thing)
        if text := clip.text_at(frame):
            write_text(image, text)
        drawn[frame] = finish(np.random.default_rng([6, clip.seed]), image, plain=clip.plain)
    return np.stack([drawn[frame] for frame in (drawn if distinct else clip.states())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    clip = sample_clip(args.seed)
    frames = draw_clip(clip)
    columns = math.ceil(len(frames) / 2)
    sheet = [np.concatenate(list(frames[i : i + columns]), axis=1) for i in (0, len(frames) - columns)]
    Image.fromarray(np.concatenate(sheet)).save(args.out)
    for event in clip.events:
        print(clip.things[event.thing].name if event.thing >= 0 else "text", event)


if __name__ == "__main__":
    main()
