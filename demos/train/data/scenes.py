"""Still scenes: a seed gives a scene, a scene gives a picture and the labels of its patches.

A scene is plain data (what is where); drawing and questions only read it, so picture, answer and labels cannot
disagree. Objects sit in different cells of a 3x3 grid, off its centre by a jitter, which makes "where" and the reading
order of a caption unambiguous. Seeds below HELD_OUT are for training, the others for evaluation.

Knows nothing of models or tokenizers. Look at some:  python -m demos.train.data.scenes --seed 3 --out /tmp/scenes.png
"""

import argparse
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE_PX = 224
PATCH_PX = 14
GRID = SIDE_PX // PATCH_PX  # 16 patches per side
CELL_PX = SIDE_PX / 3
HELD_OUT = 1_000_000_000  # first seed of the held-out range

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
COLORS = {
    "red": (214, 30, 36),
    "orange": (245, 134, 20),
    "yellow": (247, 222, 36),
    "green": (28, 150, 56),
    "blue": (32, 76, 216),
    "purple": (128, 36, 168),
    "pink": (250, 132, 186),
    "black": (18, 18, 22),
    "white": (250, 250, 250),
}
SIZES = {"small": (11, 15), "large": (22, 28)}  # radius in px, inclusive
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # no 0/O, 1/I
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
FONT_PX = (24, 32)
TEXT_LENGTH = (3, 6)
JITTER_PX = 16
OUTLINE_SHARE = 0.3
CLUTTER_SHARE = 0.5
MIN_CONTRAST = 95.0  # RGB distance between the background's colours and every object's colour


@dataclass(frozen=True)
class Thing:
    """One drawn object. x, y: centre in px; angle in degrees; rgb: its colour with jitter."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]
    outline: bool

    @property
    def row(self) -> int:
        return min(2, int(self.y / CELL_PX))

    @property
    def column(self) -> int:
        return min(2, int(self.x / CELL_PX))

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Text:
    """One line of characters. x, y: left edge and vertical middle in px."""

    string: str
    color: str
    font: str
    font_px: int
    x: float
    y: float
    rgb: tuple[int, int, int]

    @property
    def centers(self) -> list[tuple[float, float]]:
        """Centre (x, y) in px of each character."""
        x, centers = self.x, []
        for character in self.string:
            advance = load_font(self.font, self.font_px).getlength(character)
            centers.append((x + advance / 2, self.y))
            x += advance
        return centers

    @property
    def width(self) -> float:
        return sum(load_font(self.font, self.font_px).getlength(c) for c in self.string)

    @property
    def row(self) -> int:
        return min(2, int(self.y / CELL_PX))

    @property
    def column(self) -> int:
        return min(2, int((self.x + self.width / 2) / CELL_PX))


@dataclass(frozen=True)
class Scene:
    """Things in reading order (cell row, then cell column), texts from top to bottom."""

    seed: int
    things: tuple[Thing, ...]
    texts: tuple[Text, ...]


def cell_name(row: int, column: int) -> str:
    """("top", "left") → "top left"; the middle cell is just "center"."""
    return "center" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"


@cache
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # fonts that ship with a Python package, on any machine
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size_px)


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_scene(seed: int, *, num_things: int | None = None, num_texts: int | None = None) -> Scene:
    """The scene of a seed. Counts left open are drawn: 1-6 things, 0-2 texts (.35, .55, .10)."""
    rng = np.random.default_rng([1, seed])
    num_things = int(rng.integers(1, 7)) if num_things is None else num_things
    num_texts = int(rng.choice(3, p=(0.35, 0.55, 0.10))) if num_texts is None else num_texts
    texts = sample_texts(rng, num_texts)
    taken = {(t.row, column) for t in texts for column in range(3) if overlaps_column(t, column)}
    free = [(row, column) for row in range(3) for column in range(3) if (row, column) not in taken]
    cells = [free[i] for i in rng.permutation(len(free))[:num_things]]
    things: list[Thing] = []
    for row, column in sorted(cells):
        things.append(sample_thing(rng, row, column, things))
    return Scene(seed, tuple(things), tuple(sorted(texts, key=lambda t: t.y)))


def sample_thing(rng: np.random.Generator, row: int, column: int, others: list[Thing]) -> Thing:
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
    radius = float(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
    while True:
        x, y = ((c + 0.5) * CELL_PX + rng.uniform(-JITTER_PX, JITTER_PX) for c in (column, row))
        if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + 2 for o in others):
            break
        radius = max(SIZES[size][0], radius - 0.5)
    angle = float(rng.uniform(-12, 12))
    return Thing(shape, color, size, x, y, radius, angle, jitter(rng, color), bool(rng.random() < OUTLINE_SHARE))


def sample_texts(rng: np.random.Generator, count: int) -> list[Text]:
    """Texts of different colours in different rows of the grid."""
    rows, colors = rng.permutation(3), rng.permutation(list(COLORS))
    texts = []
    for i in range(count):
        string = sample_string(rng, int(rng.integers(TEXT_LENGTH[0], TEXT_LENGTH[1] + 1)))
        color, font = str(colors[i]), str(rng.choice(FONTS))
        font_px = int(rng.integers(FONT_PX[0], FONT_PX[1] + 1))
        text = Text(
            string, color, font, font_px, 0, (rows[i] + 0.5) * CELL_PX + rng.uniform(-14, 14), jitter(rng, color)
        )
        x = rng.uniform(6, SIDE_PX - 6 - text.width)
        texts.append(Text(string, color, font, font_px, x, text.y, text.rgb))
    return texts


def sample_string(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(CHARACTERS), size=length))


def overlaps_column(text: Text, column: int) -> bool:
    """Whether the text reaches into, or within 8 px of, a column of cells: no thing is put there."""
    left, right = column * CELL_PX - 8, (column + 1) * CELL_PX + 8
    return text.x < right and text.x + text.width > left


def jitter(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    values = np.clip(np.array(COLORS[color]) + rng.integers(-10, 11, size=3), 0, 255)
    return (int(values[0]), int(values[1]), int(values[2]))


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, uint8 (224, 224, 3)."""
    rng = np.random.default_rng([2, scene.seed])
    image = draw_background(rng, {t.color for t in (*scene.things, *scene.texts)})
    for thing in scene.things:
        paste_thing(image, thing)
    for text in scene.texts:
        write_text(image, text)
    return add_grain(rng, image)


def draw_background(rng: np.random.Generator, avoid: set[str]) -> Image.Image:
    """A flat, graded, cloudy, striped or checked ground in two close colours that contrast with those in use."""
    far_from = np.array([COLORS[c] for c in sorted(avoid)] or [(-999, -999, -999)])
    contrast = MIN_CONTRAST
    while True:
        base = rng.integers(20, 250, size=3).astype(float)
        if rng.random() < 0.6:  # grounds are mostly dull
            base = base.mean() + (base - base.mean()) * 0.35
        other = np.clip(base + rng.uniform(-30, 30, size=3), 0, 255)
        if min(np.linalg.norm(far_from - c, axis=1).min() for c in (base, other)) > contrast:
            break
        contrast -= 0.3
    ramp = {0: flat, 1: graded, 2: cloudy, 3: striped, 4: checked}[int(rng.integers(5))](rng)  # (224, 224) in 0..1
    image = Image.fromarray((base + (other - base) * ramp[..., None]).astype(np.uint8))
    if rng.random() < CLUTTER_SHARE:
        draw_clutter(rng, image, other)
    return image


def flat(rng: np.random.Generator) -> np.ndarray:
    return np.zeros((SIDE_PX, SIDE_PX))


def graded(rng: np.random.Generator) -> np.ndarray:
    angle, axis = rng.uniform(0, 2 * math.pi), np.linspace(-0.5, 0.5, SIDE_PX)
    return np.clip(0.5 + 0.8 * (math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None]), 0, 1)


def cloudy(rng: np.random.Generator) -> np.ndarray:
    size = int(rng.integers(4, 12))
    noise = Image.fromarray((rng.random((size, size)) * 255).astype(np.uint8))
    return np.asarray(noise.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)) / 255


def striped(rng: np.random.Generator) -> np.ndarray:
    period, axis = rng.integers(8, 40), np.arange(SIDE_PX)
    mix = [(1, 0), (0, 1), (1, 1)][int(rng.integers(3))]
    return ((mix[0] * axis[None] + mix[1] * axis[:, None]) // period % 2).astype(float) * np.ones((SIDE_PX, SIDE_PX))


def checked(rng: np.random.Generator) -> np.ndarray:
    tiles = np.arange(SIDE_PX) // rng.integers(10, 40)
    return ((tiles[None] + tiles[:, None]) % 2).astype(float)


def draw_clutter(rng: np.random.Generator, image: Image.Image, base: np.ndarray) -> None:
    """Thin lines, dots and squiggles near the ground's colour: things to be ignored."""
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 22))):
        color = tuple(int(v) for v in np.clip(base + rng.uniform(-38, 38, size=3), 0, 255))
        x, y = rng.uniform(0, SIDE_PX, size=2)
        kind = rng.integers(3)
        if kind == 0:
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(8, 60)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line((x, y, *end), fill=color, width=int(rng.integers(1, 3)))
        elif kind == 1:
            radius = rng.uniform(1, 4)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            start = rng.uniform(0, 300)
            draw.arc(
                (x, y, x + rng.uniform(6, 30), y + rng.uniform(6, 30)), start, start + rng.uniform(60, 300), fill=color
            )


def paste_thing(image: Image.Image, thing: Thing) -> None:
    mask, corner = thing_mask(thing)
    if thing.outline:  # a darker rim, drawn as a slightly larger silhouette
        rim, rim_corner = thing_mask(Thing(**{**thing.__dict__, "radius": thing.radius + 2}))
        image.paste(tuple(int(v * 0.45) for v in thing.rgb), rim_corner, rim)
    image.paste(thing.rgb, corner, mask)


def thing_mask(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """Antialiased silhouette and its top-left corner in the picture."""
    scale, half = 3, math.ceil(thing.radius) + 2
    left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
    side = 2 * half + 1
    center = np.array([thing.x - left, thing.y - top])
    large = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(large)
    for outline, fill in outlines(thing.shape):
        angle = math.radians(thing.angle)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = (center + thing.radius * outline @ turn.T) * scale
        draw.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    return large.resize((side, side), Image.Resampling.BOX), (left, top)


@cache
def outlines(shape: str) -> tuple[tuple[np.ndarray, int], ...]:
    """Polygons (P, 2) inside the unit circle, y down, with their fill; a ring is a disc with a hole."""
    turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "circle":
        return ((disc * 0.95, 255),)
    if shape == "ring":
        return ((disc, 255), (disc * 0.55, 0))
    if shape == "square":
        return ((np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.8, 255),)
    if shape == "diamond":
        return ((np.array([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]), 255),)
    if shape == "triangle":
        return ((np.array([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]), 255),)
    if shape == "cross":
        a, b = 0.95, 0.32
        corners = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
        return ((np.array(corners), 255),)
    if shape == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return ((np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1), 255),)
    heart_x = 16 * np.sin(turn) ** 3
    heart_y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return ((np.stack([heart_x, heart_y], axis=1) / 17, 255),)


def write_text(image: Image.Image, text: Text) -> None:
    draw, font = ImageDraw.Draw(image), load_font(text.font, text.font_px)
    for character, (x, y) in zip(text.string, text.centers, strict=True):
        draw.text((x, y), character, font=font, fill=text.rgb, anchor="mm")


def add_grain(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    pixels = np.asarray(image)
    level = int(rng.integers(0, 9))
    if level == 0:
        return pixels.copy()
    grain = rng.integers(-level, level + 1, size=(SIDE_PX, SIDE_PX, 1), dtype=np.int16)
    return np.clip(pixels.astype(np.int16) + grain, 0, 255).astype(np.uint8)


# ── labels ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def thing_patches(thing: Thing) -> np.ndarray:
    """Indices (raster) of the patches that a thing covers by a quarter or more; its centre's patch at least."""
    full = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    full.paste(*thing_mask(thing))
    cover = np.asarray(full, dtype=np.float32).reshape(GRID, PATCH_PX, GRID, PATCH_PX).mean((1, 3)) / 255
    found = np.flatnonzero(cover.ravel() > 0.25)
    return found if len(found) else np.array([patch_at(thing.x, thing.y)])


def patch_at(x: float, y: float) -> int:
    column, row = (int(min(max(v // PATCH_PX, 0), GRID - 1)) for v in (x, y))
    return row * GRID + column


def patch_labels(things: tuple[Thing, ...], texts: tuple[Text, ...]) -> dict[str, np.ndarray]:
    """Per patch, 0 for nothing else 1 + class, int64 (256,): shape, color, size, first and second character in it."""
    labels = {name: np.zeros(GRID * GRID, dtype=np.int64) for name in ("shape", "color", "size", "char1", "char2")}
    colors, sizes = list(COLORS), list(SIZES)
    for thing in things:
        patches = thing_patches(thing)
        labels["shape"][patches] = 1 + SHAPES.index(thing.shape)
        labels["color"][patches] = 1 + colors.index(thing.color)
        labels["size"][patches] = 1 + sizes.index(thing.size)
    for text in texts:
        for character, center in zip(text.string, text.centers, strict=True):
            patch = patch_at(*center)
            name = "char2" if labels["char1"][patch] else "char1"
            labels[name][patch] = 1 + CHARACTERS.index(character)
            labels["color"][patch] = 1 + colors.index(text.color)
    return labels


# ── crowded pictures for the tower's own training ─────────────────────────────────────────────────────────────────────


def sample_crowd(seed: int) -> Scene:
    """Many texts and things wherever they fit: more labels per picture than a scene has. Not for questions."""
    rng = np.random.default_rng([3, seed])
    taken = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
    things, texts = [], []
    for _ in range(int(rng.integers(30, 60))):
        color = str(rng.choice(list(COLORS)))
        if rng.random() < 0.55:
            string, font = sample_string(rng, int(rng.integers(1, 7))), str(rng.choice(FONTS))
            text = Text(string, color, font, int(rng.integers(22, 34)), 0, 0, jitter(rng, color))
            height = text.font_px * 0.8
            if text.width > SIDE_PX - 4:
                continue
            x, y = rng.uniform(2, SIDE_PX - 2 - text.width), rng.uniform(height / 2, SIDE_PX - height / 2)
            if claim(taken, x, y - height / 2, x + text.width, y + height / 2):
                texts.append(Text(string, color, font, text.font_px, x, y, text.rgb))
            continue
        size = str(rng.choice(list(SIZES), p=(0.6, 0.4)))
        radius = float(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
        x, y = rng.uniform(radius, SIDE_PX - radius, size=2)
        if claim(taken, x - radius, y - radius, x + radius, y + radius):
            shape, outline = str(rng.choice(SHAPES)), bool(rng.random() < OUTLINE_SHARE)
            angle = float(rng.uniform(-12, 12))
            things.append(Thing(shape, color, size, x, y, radius, angle, jitter(rng, color), outline))
    return Scene(seed, tuple(things), tuple(texts))


def claim(taken: np.ndarray, left: float, top: float, right: float, bottom: float) -> bool:
    """Mark a box as taken and say True, or say False when part of it is."""
    box = (slice(max(0, int(top)), int(bottom) + 1), slice(max(0, int(left)), int(right) + 1))
    if taken[box].any():
        return False
    taken[box] = True
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [[draw_scene(f(args.seed + i)) for i in range(5)] for f in (sample_scene, sample_crowd)]
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(args.out)


if __name__ == "__main__":
    main()
