"""What pictures are made of, as plain data: things, texts, charts, and the vocabulary of all of them.

Nothing here draws or asks. There are 3x3 cells; x and y are px from the top left corner.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import ImageFont

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
# Other values that people call by the same name, as in style sheets and drawing programs.
MORE_COLORS = {
    "red": ((255, 0, 0), (200, 16, 46), (220, 53, 69)),
    "orange": ((255, 165, 0), (255, 127, 14), (253, 126, 20)),
    "yellow": ((255, 255, 0), (255, 215, 0), (255, 235, 80)),
    "green": ((0, 128, 0), (0, 170, 60), (44, 160, 44), (60, 200, 80)),
    "blue": ((0, 0, 255), (31, 119, 180), (0, 90, 220), (40, 60, 160)),
    "purple": ((128, 0, 128), (111, 66, 193), (148, 60, 200)),
    "pink": ((255, 192, 203), (255, 105, 180), (245, 150, 200)),
    "black": ((0, 0, 0), (34, 34, 34)),
    "white": ((255, 255, 255),),
}
SIZES = {"small": (11, 15), "large": (22, 28)}  # radius in px, inclusive
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
# Texts are letters and the digits 2-9. 0 and 1 occur only in numbers, which consist of digits. So the neighbours decide
# between O and 0, and between I and 1, even where a font draws them alike.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS
RANDOM_CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # of strings that are no words
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmss10",
)
SMALL_CAPITALS = {"STIXGeneral": 1.15, "STIXGeneralBol": 1.15, "cmss10": 1.12}  # drawn larger, to be as legible
SEGMENTS = "segments"  # the font of seven-segment displays
SEGMENT_ADVANCE = 0.72  # of the height
ALL_WORDS = """
STOP OPEN EXIT SALE FREE HELP MENU HOME NEWS CAFE TAXI BANK SHOP PARK ROAD HOTEL PIZZA BREAD COFFEE MUSIC VIDEO
PHOTO START PLAY PAUSE NEXT BACK SAVE LOAD EDIT VIEW FILE ZOOM CLOSE ENTER PUSH PULL WAIT HELLO WORLD GOOD YES NOW
NEW HOT COLD LEFT RIGHT NORTH SOUTH EAST WEST RED BLUE GREEN BLACK WHITE BIG FAST SLOW SUN MOON STAR RAIN SNOW WIND
FIRE WATER LIGHT NIGHT CAT DOG BIRD FISH HORSE TREE ROSE LEAF BOOK PEN DESK CHAIR TABLE DOOR HOUSE CITY TRAIN BUS
CAR BIKE SHIP PLANE MILK TEA FRUIT APPLE LEMON JUICE SUGAR SALT KEY LOCK CODE DATA TEST PASS FAIL ERROR READY DONE
LOGIN USER ADMIN JOB WORK TEAM GAME SCORE LEVEL GOAL CUP BALL KING QUEEN JAZZ ROCK SIX QUIZ VOTE MAP ZONE GATE LIFT
TOUR VAN BOX WAX
"""
WORDS = ALL_WORDS.split()


@dataclass(frozen=True)
class Thing:
    """One drawn object.

    angle in degrees; rgb: its colour with jitter; stretch: width over height; style: which variant of the shape.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]
    outline: bool
    stretch: float = 1.0
    style: int = 0

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
    """One line of characters. x, y: left edge and vertical middle; panel: colour of the box under it."""

    string: str
    color: str
    font: str
    font_px: int
    x: float
    y: float
    rgb: tuple[int, int, int]
    panel: tuple[int, int, int] | None = None

    @property
    def centers(self) -> list[tuple[float, float]]:
        """Centre (x, y) of each character."""
        x, centers = self.x, []
        for character in self.string:
            step = advance(self.font, self.font_px, character)
            centers.append((x + step / 2, self.y))
            x += step
        return centers

    @property
    def width(self) -> float:
        return sum(advance(self.font, self.font_px, c) for c in self.string)

    @property
    def row(self) -> int:
        return min(2, int(self.y / CELL_PX))

    @property
    def column(self) -> int:
        return min(2, max(0, int((self.x + self.width / 2) / CELL_PX)))


@dataclass(frozen=True)
class Bar:
    """A bar of a chart from (left, top) to (right, bottom), with its value above and, perhaps, a letter below."""

    color: str
    rgb: tuple[int, int, int]
    value: int
    left: float
    top: float
    right: float
    bottom: float
    value_text: Text | None
    label_text: Text | None


@dataclass(frozen=True)
class Chart:
    """Bars from left to right, no two of one colour or value. ink: of the axes."""

    bars: tuple[Bar, ...]
    ink: tuple[int, int, int]

    @property
    def texts(self) -> tuple[Text, ...]:
        """Values and letters, from left to right."""
        return tuple(t for bar in self.bars for t in (bar.value_text, bar.label_text) if t)


@dataclass(frozen=True)
class Scene:
    """Things in reading order (cell row, then cell column), texts from top to bottom; perhaps a chart or a display.

    plain: on one flat colour, without grain or clutter.
    """

    seed: int
    things: tuple[Thing, ...]
    texts: tuple[Text, ...]
    chart: Chart | None = None
    display: Text | None = None
    plain: bool = False

    @property
    def all_texts(self) -> tuple[Text, ...]:
        return (*self.texts, *((self.display,) if self.display else ()), *(self.chart.texts if self.chart else ()))


def cell_name(row: int, column: int) -> str:
    """("top", "left") → "top left"; the middle cell is just "center"."""
    return "center" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"


@cache
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # fonts that ship with a Python package, on any machine
    return ImageFont.truetype(str(folder / f"{name}.ttf"), round(size_px * SMALL_CAPITALS.get(name, 1)))


@cache
def advance(font: str, font_px: int, character: str) -> float:
    """Width that a character takes."""
    if font == SEGMENTS:
        return font_px * SEGMENT_ADVANCE
    return load_font(font, font_px).getlength(character)


def jitter(rng: np.random.Generator, color: str, spread: int = 12) -> tuple[int, int, int]:
    """A value that goes by the colour's name: near its usual one, or one of the others."""
    base = COLORS[color]
    if rng.random() < 0.4:
        base = MORE_COLORS[color][rng.integers(len(MORE_COLORS[color]))]
    values = np.clip(np.array(base) + rng.integers(-spread, spread + 1, size=3), 0, 255)
    return (int(values[0]), int(values[1]), int(values[2]))


def sample_string(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(RANDOM_CHARACTERS), size=length))


def sample_number(rng: np.random.Generator, length: int) -> str:
    """Digits, the first of them not 0 where there are more."""
    digits = rng.choice(list(DIGITS), size=length)
    if length > 1 and digits[0] == "0":
        digits[0] = str(rng.integers(1, 10))
    return "".join(digits)
