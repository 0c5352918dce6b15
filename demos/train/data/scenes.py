"""Still scenes: a seed gives a scene, and a scene gives a picture.

A scene is plain data (what is where, see things.py); drawing and questions only read it, so picture, answer and labels
cannot disagree. Objects sit in different cells of a 3x3 grid, off its centre by a jitter, which makes "where" and the
reading order of a caption unambiguous. Most scenes hold objects and texts; some a chart, a display, one big object or
only words. Seeds below HELD_OUT are for training, the others for evaluation.

Knows nothing of models or tokenizers. Look at some:  python -m demos.train.data.scenes --seed 3 --out /tmp/scenes.png
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from demos.train.data.drawing import RGB, draw_chart, draw_ground, finish, paste_thing, write_text
from demos.train.data.things import (
    CELL_PX,
    COLORS,
    FONTS,
    HELD_OUT,
    SEGMENTS,
    SHAPES,
    SIDE_PX,
    SIZES,
    WORDS,
    Bar,
    Chart,
    Scene,
    Text,
    Thing,
    cell_name,
    jitter,
    sample_number,
    sample_string,
)

__all__ = ["HELD_OUT", "Scene", "cell_name", "draw_scene", "sample_scene"]

LAYOUTS = {"objects": 0.62, "chart": 0.14, "display": 0.11, "single": 0.06, "page": 0.07}
TEXT_COUNTS = (0.30, 0.38, 0.22, 0.10)  # of 0-3 texts among objects
WORD_SHARE, NUMBER_SHARE = 0.35, 0.07
PLAIN_SHARE = 0.25
FONT_PX, TITLE_PX = (24, 32), (33, 50)
TEXT_LENGTH = (3, 6)
JITTER_PX = 16
OUTLINE_SHARE = 0.3
CHART_VALUES = {9: 1, 20: 2, 60: 4, 99: 7}  # highest value → least difference of two bars
DISPLAY_COLORS = ("red", "green", "orange", "yellow", "blue", "white")


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_scene(seed: int, *, num_things: int | None = None, num_texts: int | None = None) -> Scene:
    """The scene of a seed. Counts left open are drawn: 1-6 things, 0-3 texts. With a count given: objects and texts.

    Texts come first, so that things get the cells they leave free: there may be fewer things than asked for.
    """
    rng = np.random.default_rng([1, seed])
    layout = str(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    plain = bool(rng.random() < (PLAIN_SHARE if layout == "objects" else 0.5))
    if num_things is not None or num_texts is not None:
        layout = "objects"
    if layout == "single":
        return Scene(seed, (sample_big(rng),), (), plain=plain)
    rows = [int(row) for row in rng.permutation(3)]
    chart, display = None, None
    if layout == "chart":
        chart, rows = sample_chart(rng)
    elif layout == "display":
        display = sample_display(rng, rows.pop())
    if num_texts is None:
        shares = TEXT_COUNTS if layout == "objects" else (0.0, 0.4, 0.4, 0.2) if layout == "page" else (0.6, 0.4)
        num_texts = int(rng.choice(len(shares), p=shares))
    if num_things is None:
        num_things = 0 if layout == "page" else int(rng.integers(1, 7))
    texts = sample_texts(rng, rows[:num_texts], titles=layout == "page")
    taken = {(t.row, column) for t in texts for column in range(3) if overlaps_column(t, column)}
    free = [(row, column) for row in rows for column in range(3) if (row, column) not in taken]
    cells = [free[i] for i in rng.permutation(len(free))[:num_things]]
    things: list[Thing] = []
    for row, column in sorted(cells):
        things.append(sample_thing(rng, row, column, things, centered=plain and bool(seed % 2)))
    return Scene(seed, tuple(things), tuple(sorted(texts, key=lambda t: t.y)), chart, display, plain)


def sample_thing(
    rng: np.random.Generator, row: int, column: int, others: list[Thing], *, centered: bool = False
) -> Thing:
    """A thing in a cell that overlaps no other and shares neither all of (shape, color) with one."""
    names = {t.name for t in others}
    while True:
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        if others and rng.random() < 0.25:  # share an attribute on purpose: makes references and negatives bind
            other = others[rng.integers(len(others))]
            shape, color = (other.shape, color) if rng.random() < 0.5 else (shape, other.color)
        if f"{color} {shape}" not in names:
            break
    size = str(rng.choice(list(SIZES)))
    radius = float(rng.integers(SIZES[size][0], SIZES[size][1] + (6 if size == "large" else 1)))
    spread = 1.0 if centered else JITTER_PX
    while True:
        x, y = ((c + 0.5) * CELL_PX + rng.uniform(-spread, spread) for c in (column, row))
        if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + 2 for o in others):
            break
        radius = max(SIZES[size][0], radius - 0.5)
    return dress(
        rng, Thing(shape, color, size, x, y, radius, 0, jitter(rng, color), bool(rng.random() < OUTLINE_SHARE))
    )


def dress(rng: np.random.Generator, thing: Thing) -> Thing:
    """The thing turned a little, perhaps stretched, in one of its variants."""
    wide = thing.shape in ("star", "heart", "triangle", "cross") and rng.random() < 0.2
    angle = float(rng.uniform(-28, 28) if wide else rng.uniform(-12, 12) if rng.random() < 0.7 else 0)
    stretch = float(rng.uniform(0.86, 1.16)) if rng.random() < 0.35 else 1.0
    style = int(rng.choice(3, p=(0.5, 0.25, 0.25)))
    return Thing(**{**thing.__dict__, "angle": angle, "stretch": stretch, "style": style})


def sample_big(rng: np.random.Generator) -> Thing:
    """One thing that fills much of the picture."""
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    row, column = (1, 1) if rng.random() < 0.7 else (int(v) for v in rng.integers(0, 3, size=2))
    x, y = ((c + 0.5) * CELL_PX + rng.uniform(-6, 6) for c in (column, row))
    radius = float(rng.uniform(26, min(90, x - 4, y - 4, SIDE_PX - x - 4, SIDE_PX - y - 4)))
    return dress(rng, Thing(shape, color, "large", x, y, radius, 0, jitter(rng, color), bool(rng.random() < 0.3)))


def sample_texts(rng: np.random.Generator, rows: list[int], *, titles: bool = False) -> list[Text]:
    """Texts of different colours, one in each of the rows of the grid."""
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    texts = []
    for row, color in zip(rows, colors, strict=False):
        if titles and rng.random() < 0.6:
            color = "black" if "black" not in {t.color for t in texts} else color
        string, font = sample_writing(rng), str(rng.choice(FONTS))
        sizes = TITLE_PX if rng.random() < (0.6 if titles else 0.1) else FONT_PX
        font_px = int(rng.integers(sizes[0], sizes[1] + 1))
        text = Text(string, color, font, font_px, 0, 0, jitter(rng, color))
        while text.width > SIDE_PX - 16:
            text = Text(string, color, font, text.font_px - 2, 0, 0, text.rgb)
        y = (row + 0.5) * CELL_PX + rng.uniform(-12, 12)
        x = rng.uniform(6, SIDE_PX - 6 - text.width)
        if titles and rng.random() < 0.5:
            x = (SIDE_PX - text.width) / 2
        texts.append(Text(string, color, font, text.font_px, x, y, text.rgb))
    return texts


def sample_writing(rng: np.random.Generator) -> str:
    kind = rng.random()
    if kind < WORD_SHARE:
        return str(rng.choice(WORDS))
    if kind < WORD_SHARE + NUMBER_SHARE:
        return sample_number(rng, int(rng.integers(2, 5)))
    return sample_string(rng, int(rng.integers(TEXT_LENGTH[0], TEXT_LENGTH[1] + 1)))


def overlaps_column(text: Text, column: int) -> bool:
    """Whether the text reaches into, or within 8 px of, a column of cells: no thing is put there."""
    left, right = column * CELL_PX - 8, (column + 1) * CELL_PX + 8
    return text.x < right and text.x + text.width > left


def sample_display(rng: np.random.Generator, row: int) -> Text:
    """A number of 1-4 digits in a box, in seven segments or a bold font, somewhere in a row of the grid."""
    string = sample_number(rng, int(rng.integers(1, 5)))
    color, font_px = str(rng.choice(DISPLAY_COLORS)), int(rng.integers(32, 47))
    shade = int(rng.integers(5, 50))
    panel = (shade, shade, shade + int(rng.integers(0, 12)))
    if rng.random() < 0.2:  # a display of the plain kind
        color, panel = "black", (190 + shade, 205 + shade, 190 + shade)
    font = SEGMENTS if rng.random() < 0.65 else ("DejaVuSansMono-Bold", "DejaVuSans-Bold")[int(rng.integers(2))]
    blank = Text(string, color, font, font_px, 0, 0, jitter(rng, color, 6), panel)
    x = rng.uniform(12, SIDE_PX - 12 - blank.width)
    return Text(string, color, font, font_px, x, (row + 0.5) * CELL_PX + rng.uniform(-4, 4), blank.rgb, panel)


def sample_chart(rng: np.random.Generator) -> tuple[Chart, list[int]]:
    """A chart of 2-5 bars, and the rows of the grid that it leaves free."""
    top_row, bottom_row = ((0, 2), (0, 1), (1, 2))[int(rng.choice(3, p=(0.3, 0.35, 0.35)))]
    count, labelled = int(rng.integers(2, 6)), bool(rng.random() < 0.6)
    ceiling = top_row * CELL_PX + rng.uniform(6, 12) + 22
    floor = (bottom_row + 1) * CELL_PX - rng.uniform(5, 10) - (24 if labelled else 0)
    left, right = rng.uniform(12, 30), SIDE_PX - rng.uniform(8, 30)
    slot = (right - left) / count
    width = min(slot * rng.uniform(0.5, 0.8), 44)
    values = sample_values(rng, count)
    ink = (250, 250, 250) if rng.random() < 0.2 else (20, 20, 24)
    ink_color = "white" if ink[0] > 128 else "black"
    colors = [str(c) for c in rng.permutation([c for c in COLORS if c != ink_color])[:count]]
    font, font_px = str(rng.choice(FONTS[:7:2])), int(rng.integers(18, 23))
    bars = []
    for i, (value, color) in enumerate(zip(values, colors, strict=True)):
        middle = left + (i + 0.5) * slot
        top = floor - (floor - ceiling) * value / max(values)
        number = centred(str(value), ink_color, font, font_px, middle, top - font_px * 0.55, ink)
        letter = None
        if labelled:
            letter = centred("ABCDE"[i], ink_color, font, font_px, middle, floor + 13, ink)
        bars.append(
            Bar(color, jitter(rng, color), value, middle - width / 2, top, middle + width / 2, floor, number, letter)
        )
    return Chart(tuple(bars), ink), [row for row in range(3) if not top_row <= row <= bottom_row]


def sample_values(rng: np.random.Generator, count: int) -> list[int]:
    highest, gap = list(CHART_VALUES.items())[int(rng.integers(len(CHART_VALUES)))]
    while True:
        values = sorted(int(v) for v in rng.integers(max(1, highest // 10), highest + 1, size=count))
        if all(b - a >= gap for a, b in pairwise(values)):
            return [values[i] for i in rng.permutation(count)]


def centred(string: str, color: str, font: str, font_px: int, x: float, y: float, rgb: RGB) -> Text:
    return Text(string, color, font, font_px, x - Text(string, color, font, font_px, 0, 0, rgb).width / 2, y, rgb)


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, uint8 (224, 224, 3)."""
    rng = np.random.default_rng([2, scene.seed])
    in_use = [item.rgb for item in (*scene.things, *scene.texts)]
    if scene.chart:
        in_use += [scene.chart.ink, *(bar.rgb for bar in scene.chart.bars)]
    if scene.display and scene.display.panel:
        in_use.append(scene.display.panel)
    image = draw_ground(rng, in_use, plain=scene.plain)
    if scene.chart:
        draw_chart(image, scene.chart)
    for thing in scene.things:
        paste_thing(image, thing)
    for text in (*scene.texts, *((scene.display,) if scene.display else ())):
        write_text(image, text)
    return finish(rng, image, plain=scene.plain)


def main() -> None:
    from demos.train.data.labels import sample_crowd  # labels import this module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4, help="of scenes, then one of crowded pictures")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [[draw_scene(sample_scene(args.seed + 7 * r + i)) for i in range(7)] for r in range(args.rows)]
    rows.append([draw_scene(sample_crowd(args.seed + i)) for i in range(7)])
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(args.out)


if __name__ == "__main__":
    main()
