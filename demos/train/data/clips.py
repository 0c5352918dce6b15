"""Clips: a seed gives a short film in which one or two things happen, one after the other.

Things stand in cells of the 3x3 grid as in a still scene. An event moves a thing to a neighbouring cell, lets it
appear or disappear, or changes its colour. Frames of one clip share their ground and grain, so only the event changes
pixels. Look at one:  python -m demos.train.data.clips --seed 3 --out /tmp/clip.png
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from demos.train.data.scenes import (
    CELL_PX,
    COLORS,
    Thing,
    add_grain,
    draw_background,
    jitter,
    paste_thing,
    sample_thing,
)

NUM_FRAMES = (8, 16)
KINDS = ("move", "appear", "disappear", "change")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)


@dataclass(frozen=True)
class Event:
    """What happens to things[thing] between frames `start` and `stop`; detail: direction or new colour."""

    kind: str
    thing: int
    start: int
    stop: int
    detail: str = ""
    after: Thing | None = None  # the thing when the event is over; None once it has disappeared


@dataclass(frozen=True)
class Clip:
    """Things as they are (or will appear) before anything happens, and the events in order of time."""

    seed: int
    num_frames: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]

    def things_at(self, frame: int) -> list[Thing | None]:
        """Every thing as seen in a frame, None where it is not seen."""
        seen: list[Thing | None] = list(self.things)
        for event in self.events:
            seen[event.thing] = thing_during(self.things[event.thing], event, frame)
        return seen


def thing_during(thing: Thing, event: Event, frame: int) -> Thing | None:
    done = min(1.0, max(0.0, (frame - event.start) / (event.stop - event.start)))
    if event.kind == "appear":
        return thing if done >= 0.5 else None
    if event.kind == "disappear":
        return thing if done < 0.5 else None
    after = event.after
    assert after is not None
    if event.kind == "change":
        return after if done >= 0.5 else thing
    return replace(thing, x=thing.x + done * (after.x - thing.x), y=thing.y + done * (after.y - thing.y))


def sample_clip(seed: int, *, num_frames: int | None = None) -> Clip:
    """1-4 things of different shapes; one event, or two (by different things) in half of the clips."""
    rng = np.random.default_rng([4, seed])
    num_frames = int(rng.choice(np.arange(NUM_FRAMES[0], NUM_FRAMES[1] + 1, 2))) if num_frames is None else num_frames
    num_events = int(rng.integers(1, 3))
    num_things = int(rng.integers(num_events, 5))
    cells = [(int(i) // 3, int(i) % 3) for i in rng.permutation(9)[:num_things]]
    things: list[Thing] = []
    for cell in cells:
        while (thing := sample_thing(rng, *cell, things)).shape in {t.shape for t in things}:
            pass
        things.append(thing)
    taken = set(cells)
    bounds = [round(i * (num_frames - 1) / num_events) for i in range(num_events + 1)]
    events = []
    for i in range(num_events):  # the things that events happen to come first in the list, events in order of time
        room = [d for d in DIRECTIONS if free_cell(cells[i], d) and moved_cell(cells[i], d) not in taken]
        kind = str(rng.choice(KINDS if room else KINDS[1:], p=(0.4, 0.2, 0.2, 0.2) if room else None))
        start, stop = bounds[i], bounds[i + 1]
        thing, detail, after = things[i], "", None
        if kind == "move":
            detail = str(rng.choice(room))
            taken.add(moved_cell(cells[i], detail))
            rows, columns = DIRECTIONS[detail]
            after = replace(thing, x=thing.x + columns * CELL_PX * 0.9, y=thing.y + rows * CELL_PX * 0.9)
        elif kind == "change":
            detail = str(rng.choice([c for c in COLORS if c != thing.color]))
            after = replace(thing, color=detail, rgb=jitter(rng, detail))
        events.append(Event(kind, i, start, stop, detail, after))
    return Clip(seed, num_frames, tuple(things), tuple(events))


def moved_cell(cell: tuple[int, int], direction: str) -> tuple[int, int]:
    return (cell[0] + DIRECTIONS[direction][0], cell[1] + DIRECTIONS[direction][1])


def free_cell(cell: tuple[int, int], direction: str) -> bool:
    return all(0 <= v <= 2 for v in moved_cell(cell, direction))


def draw_clip(clip: Clip) -> np.ndarray:
    """The frames, uint8 (T, 224, 224, 3)."""
    colors = {t.color for t in clip.things} | {e.after.color for e in clip.events if e.after}
    ground = draw_background(np.random.default_rng([5, clip.seed]), colors)
    frames = []
    for frame in range(clip.num_frames):
        image = ground.copy()
        for thing in clip.things_at(frame):
            if thing:
                paste_thing(image, thing)
        frames.append(add_grain(np.random.default_rng([6, clip.seed]), image))
    return np.stack(frames)


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
        print(clip.things[event.thing].name, event)


if __name__ == "__main__":
    main()
