"""Strokes and grounds: how a thing, a text or a chart is drawn into a picture, its background, and what covers it all.

Everything random comes from the generator that is passed in.
"""

import io
import math
from collections.abc import Iterable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demos.train.data.things import SEGMENTS, SIDE_PX, Chart, Text, Thing, load_font

CLUTTER_SHARE, MARKS_SHARE, JPEG_SHARE, RESIZED_SHARE, BLUR_SHARE = 0.5, 0.3, 0.2, 0.08, 0.15
MIN_CONTRAST = 95.0  # RGB distance between the ground's colours and those in use
MARK_CONTRAST = 45.0
# Segments of a display's digits, as in data sheets: a top, then clockwise, g in the middle.
SEGMENTS_OF = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abfgcd")
RGB = tuple[int, int, int]


# ── grounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_ground(rng: np.random.Generator, in_use: Iterable[RGB], *, plain: bool) -> Image.Image:
    """The background: one flat colour if plain, else a texture in two close colours."""
    far_from = np.array(sorted(set(in_use)) or [(-999, -999, -999)], dtype=float)
    contrast = MIN_CONTRAST
    while True:
        base, other = plain_colors(rng) if plain else ground_colors(rng)
        if min(np.linalg.norm(far_from - c, axis=1).min() for c in (base, other)) > contrast:
            break
        contrast -= 0.4
    if plain:
        return Image.new("RGB", (SIDE_PX, SIDE_PX), as_rgb(base))
    texture = TEXTURES[int(rng.integers(len(TEXTURES)))](rng)  # (224, 224) in 0..1
    image = Image.fromarray((base + (other - base) * texture[..., None]).astype(np.uint8))
    if rng.random() < CLUTTER_SHARE:
        draw_clutter(rng, image, other)
    if rng.random() < MARKS_SHARE:
        draw_marks(rng, image, base, far_from)
    return image


def ground_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    base = rng.integers(20, 250, size=3).astype(float)
    if rng.random() < 0.6:  # grounds are mostly dull
        base = base.mean() + (base - base.mean()) * 0.35
    return base, np.clip(base + rng.uniform(-30, 30, size=3), 0, 255)


def plain_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    kind = rng.random()
    if kind < 0.5:
        base = np.full(3, 255.0)
    elif kind < 0.6:
        base = np.full(3, rng.uniform(0, 30))
    elif kind < 0.85:
        base = rng.uniform(215, 255, size=3)
    else:
        base = rng.uniform(0, 255, size=3)
    return base, base


def as_rgb(values: np.ndarray) -> RGB:
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue


def flat(rng: np.random.Generator) -> np.ndarray:
    return np.zeros((SIDE_PX, SIDE_PX))


def graded(rng: np.random.Generator) -> np.ndarray:
    angle, axis = rng.uniform(0, 2 * math.pi), np.linspace(-0.5, 0.5, SIDE_PX)
    return np.clip(0.5 + 0.8 * (math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None]), 0, 1)


def cloudy(rng: np.random.Generator) -> np.ndarray:
    size = int(rng.integers(4, 24))
    noise = Image.fromarray((rng.random((size, size)) * 255).astype(np.uint8))
    return np.asarray(noise.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)) / 255


def striped(rng: np.random.Generator) -> np.ndarray:
    period, axis = rng.integers(4, 40), np.arange(SIDE_PX)
    mix = [(1, 0), (0, 1), (1, 1)][int(rng.integers(3))]
    return ((mix[0] * axis[None] + mix[1] * axis[:, None]) // period % 2).astype(float) * np.ones((SIDE_PX, SIDE_PX))


def checked(rng: np.random.Generator) -> np.ndarray:
    tiles = np.arange(SIDE_PX) // rng.integers(6, 40)
    return ((tiles[None] + tiles[:, None]) % 2).astype(float)


def bricked(rng: np.random.Generator) -> np.ndarray:
    height, width = int(rng.integers(12, 30)), int(rng.integers(24, 60))
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    shifted = x + (y // height % 2) * (width // 2)
    return ((y % height < 2) | (shifted % width < 2)).astype(float)


def dotted(rng: np.random.Generator) -> np.ndarray:
    period, radius = int(rng.integers(9, 28)), rng.uniform(1.2, 4)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] % period - period / 2
    return (x * x + y * y < radius * radius).astype(float)


def speckled(rng: np.random.Generator) -> np.ndarray:
    size = SIDE_PX // int(rng.integers(1, 4))
    noise = Image.fromarray((rng.random((size, size)) * 255).astype(np.uint8))
    return np.asarray(noise.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)) / 255


TEXTURES = (flat, graded, cloudy, striped, checked, bricked, dotted, speckled)


def draw_clutter(rng: np.random.Generator, image: Image.Image, base: np.ndarray) -> None:
    """Thin lines, dots and arcs near the ground's colour: things to be ignored."""
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 26))):
        color = as_rgb(base + rng.uniform(-38, 38, size=3))
        x, y = rng.uniform(0, SIDE_PX, size=2)
        kind = rng.integers(3)
        if kind == 0:
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(8, 60)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line((x, y, *end), fill=color, width=int(rng.integers(1, 4)))
        elif kind == 1:
            radius = rng.uniform(1, 5)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            start = rng.uniform(0, 300)
            draw.arc(
                (x, y, x + rng.uniform(6, 30), y + rng.uniform(6, 30)), start, start + rng.uniform(60, 300), fill=color
            )


def draw_marks(rng: np.random.Generator, image: Image.Image, base: np.ndarray, in_use: np.ndarray) -> None:
    """Groups of small strokes that look like writing from afar but are no characters."""
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 5))):
        color = base + rng.uniform(-90, 90, size=3)
        if np.linalg.norm(in_use - color, axis=1).min() < MARK_CONTRAST:
            continue
        x, y, height = *rng.uniform(5, SIDE_PX - 15, size=2), rng.uniform(7, 13)
        for _ in range(int(rng.integers(3, 9))):
            corners = rng.random((int(rng.integers(3, 5)), 2)) * (height * 0.6, height) + (x, y)
            draw.line([(float(a), float(b)) for a, b in corners], fill=as_rgb(color), width=1)
            x += height * 0.8


# ── things, texts, charts ─────────────────────────────────────────────────────────────────────────────────────────────


def paste_thing(image: Image.Image, thing: Thing) -> None:
    mask, corner = thing_mask(thing)
    if thing.outline:  # a darker rim, drawn as a slightly larger silhouette
        rim, rim_corner = thing_mask(Thing(**{**thing.__dict__, "radius": thing.radius + 2}))
        red, green, blue = (int(v * 0.45) for v in thing.rgb)
        image.paste((red, green, blue), rim_corner, rim)
    image.paste(thing.rgb, corner, mask)


def thing_mask(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """Antialiased silhouette and its top left corner in the picture."""
    scale, half = 3, math.ceil(thing.radius * max(1.0, thing.stretch)) + 2
    left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
    side = 2 * half + 1
    center = np.array([thing.x - left, thing.y - top])
    large = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(large)
    for outline, fill in outlines(thing.shape, thing.style):
        angle = math.radians(thing.angle)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = (center + thing.radius * (outline * (thing.stretch, 1)) @ turn.T) * scale
        draw.polygon([(float(x), float(y)) for x, y in points], fill=fill)
    return large.resize((side, side), Image.Resampling.BOX), (left, top)


@cache
def outlines(shape: str, style: int) -> tuple[tuple[np.ndarray, int], ...]:
    """Polygons (P, 2) inside the unit circle, y down, with their fill; a ring is a disc with a hole."""
    turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "circle":
        return ((disc * 0.95, 255),)
    if shape == "ring":
        return ((disc, 255), (disc * (0.55, 0.68, 0.45)[style], 0))
    if shape == "square":
        return ((np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (0.8, 0.85, 0.75)[style], 255),)
    if shape == "diamond":
        wide = (0.72, 0.62, 0.88)[style]
        return ((np.array([(0, -1), (wide, 0), (0, 1), (-wide, 0)]), 255),)
    if shape == "triangle":
        peak = (0.0, 0.0, -0.4)[style]
        low = (0.75, 0.9, 0.8)[style]
        return ((np.array([(peak, -0.95), (0.95, low), (-0.95, low)]), 255),)
    if shape == "cross":
        a, b = 0.95, (0.32, 0.22, 0.4)[style]
        quarter = np.array([(-b, -a), (b, -a), (b, -b)])
        turns = [np.array([[0, 1], [-1, 0]])] * 3
        corners = [quarter]
        for matrix in turns:
            corners.append(corners[-1] @ matrix)
        return ((np.concatenate(corners), 255),)
    if shape == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, (0.42, 0.382, 0.52)[style])
        return ((np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1), 255),)
    heart_x = 16 * np.sin(turn) ** 3
    heart_y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return ((np.stack([heart_x, heart_y], axis=1) / 17, 255),)


def write_text(image: Image.Image, text: Text) -> None:
    draw = ImageDraw.Draw(image)
    if text.panel:
        half, pad = text.font_px * 0.5, 7
        box = (text.x - pad, text.y - half - pad, text.x + text.width + pad, text.y + half + pad)
        draw.rounded_rectangle(box, radius=4, fill=text.panel)
    for character, (x, y) in zip(text.string, text.centers, strict=True):
        if text.font == SEGMENTS:
            draw_segments(draw, character, x, y, text.font_px, text.rgb)
        else:
            draw.text((x, y), character, font=load_font(text.font, text.font_px), fill=text.rgb, anchor="mm")


def draw_segments(draw: ImageDraw.ImageDraw, digit: str, x: float, y: float, height: float, rgb: RGB) -> None:
    """A seven-segment digit around (x, y)."""
    right, down, thick = height * 0.24, height * 0.44, max(2.0, height * 0.055)
    gap = thick * 0.5
    bars = {
        "a": (-right, -down, right, -down),
        "g": (-right, 0, right, 0),
        "d": (-right, down, right, down),
        "f": (-right, -down, -right, 0),
        "b": (right, -down, right, 0),
        "e": (-right, 0, -right, down),
        "c": (right, 0, right, down),
    }
    for name in SEGMENTS_OF[int(digit)]:
        left, top, end, bottom = bars[name]
        if top == bottom:  # level
            box = (x + left + gap, y + top - thick, x + end - gap, y + bottom + thick)
        else:
            box = (x + left - thick, y + top + gap, x + end + thick, y + bottom - gap)
        draw.rectangle(box, fill=rgb)


def draw_chart(image: Image.Image, chart: Chart) -> None:
    draw = ImageDraw.Draw(image)
    left, right, floor = chart.bars[0].left - 6, chart.bars[-1].right + 6, chart.bars[0].bottom
    draw.line((left, floor, right, floor), fill=chart.ink, width=2)
    draw.line((left, floor, left, min(bar.top for bar in chart.bars) - 8), fill=chart.ink, width=2)
    for bar in chart.bars:
        draw.rectangle((bar.left, bar.top, bar.right, bar.bottom - 1), fill=bar.rgb)
    for text in chart.texts:
        write_text(image, text)


# ── over everything ───────────────────────────────────────────────────────────────────────────────────────────────────


def finish(rng: np.random.Generator, image: Image.Image, *, plain: bool) -> np.ndarray:
    """What cameras and file formats do: blur, another resolution, JPEG, grain. uint8 (224, 224, 3)."""
    if rng.random() < BLUR_SHARE:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < RESIZED_SHARE:
        side = int(rng.integers(150, 224))
        image = image.resize((side, side), Image.Resampling.BICUBIC).resize(
            (SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC
        )
    if rng.random() < JPEG_SHARE:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(55, 93)))
        image = Image.open(file)
    pixels = np.asarray(image)
    level = 0 if plain else int(rng.integers(0, 9))
    if level == 0:
        return pixels.copy()
    grain = rng.integers(-level, level + 1, size=(SIDE_PX, SIDE_PX, 1), dtype=np.int16)
    return np.clip(pixels.astype(np.int16) + grain, 0, 255).astype(np.uint8)
