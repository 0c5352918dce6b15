"""What the tower learns about each patch of a picture, and crowded pictures that have many labels.

Labels per patch, 0 for nothing, else 1 + class: shape, color and size of the thing in it; the cell of the thing's
centre; the characters whose centres lie in it, the position of the first of them in its text (what a reader needs to go
on from character to character) and whether it is the last; height of a bar, and whether it is the highest or lowest.
"""

import numpy as np
from PIL import Image

from demos.train.data.drawing import thing_mask
from demos.train.data.scenes import OUTLINE_SHARE, dress, sample_chart, sample_writing
from demos.train.data.things import (
    CHARACTERS,
    COLORS,
    DIGITS,
    FONTS,
    GRID,
    PATCH_PX,
    RANDOM_CHARACTERS,
    SEGMENTS,
    SHAPES,
    SIDE_PX,
    SIZES,
    Bar,
    Scene,
    Text,
    Thing,
    jitter,
)

FORMS = (*SHAPES, "bar")  # what a patch can be part of
MAX_INDEX = 6  # characters of a text
LEVELS = 8
NUM_CLASSES = {
    "shape": 1 + len(FORMS),
    "color": 1 + len(COLORS),
    "size": 1 + len(SIZES),
    "cell": 1 + 9,
    "char1": 1 + len(CHARACTERS),
    "char2": 1 + len(CHARACTERS),
    "index": 1 + MAX_INDEX,
    "last": 1 + 2,  # more characters follow, the text ends here
    "level": 1 + LEVELS,
    "extreme": 1 + 3,  # lowest, between, highest
    "row": GRID,
    "column": GRID,
}


def thing_patches(thing: Thing) -> np.ndarray:
    """Indices (raster) of the patches that a thing covers by a quarter or more; its centre's patch at least."""
    full = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    full.paste(*thing_mask(thing))
    cover = np.asarray(full, dtype=np.float32).reshape(GRID, PATCH_PX, GRID, PATCH_PX).mean((1, 3)) / 255
    found = np.flatnonzero(cover.ravel() > 0.25)
    return found if len(found) else np.array([patch_at(thing.x, thing.y)])


def bar_patches(bar: Bar) -> np.ndarray:
    """Indices (raster) of the patches whose centres a bar covers; the one of its foot at least."""
    middles = (np.arange(GRID) + 0.5) * PATCH_PX
    rows, columns = (bar.top < middles) & (middles < bar.bottom), (bar.left < middles) & (middles < bar.right)
    found = np.flatnonzero(rows[:, None] & columns)
    return found if len(found) else np.array([patch_at((bar.left + bar.right) / 2, bar.bottom - 3)])


def patch_at(x: float, y: float) -> int:
    column, row = (int(min(max(v // PATCH_PX, 0), GRID - 1)) for v in (x, y))
    return row * GRID + column


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """int64 (256,) for each of NUM_CLASSES."""
    labels = {name: np.zeros(GRID * GRID, dtype=np.int64) for name in NUM_CLASSES}
    colors, sizes = list(COLORS), list(SIZES)
    for thing in scene.things:
        patches = thing_patches(thing)
        labels["shape"][patches] = 1 + FORMS.index(thing.shape)
        labels["color"][patches] = 1 + colors.index(thing.color)
        labels["size"][patches] = 1 + sizes.index(thing.size)
        labels["cell"][patches] = 1 + thing.row * 3 + thing.column
    if scene.chart:
        label_bars(labels, scene.chart.bars)
    for text, owner in text_owners(scene):
        for index, (character, center) in enumerate(zip(text.string, text.centers, strict=True)):
            patch = patch_at(*center)
            if labels["char1"][patch]:
                labels["char2"][patch] = 1 + CHARACTERS.index(character)
                continue
            labels["char1"][patch] = 1 + CHARACTERS.index(character)
            labels["index"][patch] = 1 + min(index, MAX_INDEX - 1)
            labels["last"][patch] = 2 if index + 1 == len(text.string) else 1
            labels["color"][patch] = 1 + colors.index(owner)
    labels["row"], labels["column"] = np.divmod(np.arange(GRID * GRID), GRID)
    return labels


def text_owners(scene: Scene) -> list[tuple[Text, str]]:
    """Every text with the color it is found by: its own, but that of its bar in a chart."""
    own = [(text, text.color) for text in (*scene.texts, *((scene.display,) if scene.display else ()))]
    bars = scene.chart.bars if scene.chart else ()
    return own + [(text, bar.color) for bar in bars for text in (bar.value_text, bar.label_text) if text]


def label_bars(labels: dict[str, np.ndarray], bars: tuple[Bar, ...]) -> None:
    values = [bar.value for bar in bars]
    for bar in bars:
        patches = bar_patches(bar)
        labels["shape"][patches] = 1 + FORMS.index("bar")
        labels["color"][patches] = 1 + list(COLORS).index(bar.color)
        labels["level"][patches] = 1 + min(LEVELS - 1, int(LEVELS * bar.value / max(values)))
        labels["extreme"][patches] = 3 if bar.value == max(values) else 1 if bar.value == min(values) else 2


# ── crowded pictures for the tower's own training ─────────────────────────────────────────────────────────────────────


def sample_crowd(seed: int) -> Scene:
    """Many texts and things wherever they fit: more labels per picture than a scene has. Not for questions."""
    rng = np.random.default_rng([3, seed])
    taken = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
    things, texts, chart = [], [], None
    if rng.random() < 0.15:
        chart, _ = sample_chart(rng)
        bars = chart.bars
        claim(taken, 0, min(b.top for b in bars) - 26, SIDE_PX, bars[0].bottom + 26)
    for _ in range(int(rng.integers(25, 55))):
        color = str(rng.choice(list(COLORS)))
        if rng.random() < 0.6:
            text = crowd_text(rng, color)
            height = text.font_px * 0.85
            if text.width > SIDE_PX - 4:
                continue
            x, y = rng.uniform(2, SIDE_PX - 2 - text.width), rng.uniform(height / 2, SIDE_PX - height / 2)
            if claim(taken, x - 3, y - height / 2, x + text.width + 3, y + height / 2):
                texts.append(Text(text.string, color, text.font, text.font_px, x, y, text.rgb))
            continue
        size = str(rng.choice(list(SIZES), p=(0.6, 0.4)))
        radius = float(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
        x, y = rng.uniform(radius, SIDE_PX - radius, size=2)
        if claim(taken, x - radius, y - radius, x + radius, y + radius):
            shape, outline = str(rng.choice(SHAPES)), bool(rng.random() < OUTLINE_SHARE)
            things.append(dress(rng, Thing(shape, color, size, x, y, radius, 0, jitter(rng, color), outline)))
    return Scene(seed, tuple(things), tuple(texts), chart)


def crowd_text(rng: np.random.Generator, color: str) -> Text:
    kind, font, font_px = rng.random(), str(rng.choice(FONTS)), int(rng.integers(20, 34))
    if kind < 0.15:  # single characters: none of 0, O, 1, I
        string = str(rng.choice(list(RANDOM_CHARACTERS)))
    elif kind < 0.3:
        string = "".join(rng.choice(list(DIGITS), size=int(rng.integers(2, 5))))
        if rng.random() < 0.5:
            font = SEGMENTS
    else:
        string = sample_writing(rng)
    return Text(string, color, font, font_px, 0, 0, jitter(rng, color))


def claim(taken: np.ndarray, left: float, top: float, right: float, bottom: float) -> bool:
    """Mark a box as taken and return True, or return False when part of it is taken."""
    box = (slice(max(0, int(top)), int(bottom) + 1), slice(max(0, int(left)), int(right) + 1))
    if taken[box].any():
        return False
    taken[box] = True
    return True
