"""Draw the pictures that the training's generator did not: pages, drawings and charts of 224 px by other programs.

Chromium renders the pages and drawings with its own fonts and rasteriser, matplotlib the charts. All of it was made
for this project. Writes one PNG each, and questions.jsonl: what is asked about it and which answers are sensible.

    python -m demos.samples.outside.make          Needs: playwright and a chromium in PATH, matplotlib.

A line of questions.jsonl has `equals`, answers that count as they stand (after `plain` of serve/evaluation/scoring.py),
or `says`, phrases that all have to occur in a longer answer, which names `at_most` so many things.
"""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent
SIDE_PX = 224

SANS, SERIF, MONO = "Liberation Sans, Arial", "Liberation Serif, Times New Roman", "Liberation Mono, Courier New"
CENTERED = "display:flex;align-items:center;justify-content:center;height:224px;text-align:center"


def equals(question: str, *answers: str) -> dict:
    return {"question": question, "equals": list(answers)}


def says(question: str, *phrases: str, at_most: int) -> dict:
    return {"question": question, "says": list(phrases), "at_most": at_most}


def page(body: str, style: str = "", font: str = SANS) -> str:
    return f'<body style="margin:0;background:white;color:black;font-family:{font};{style}">{body}</body>'


def svg(shapes: str, background: str = "white") -> str:
    return (
        f'<body style="margin:0"><svg width="224" height="224" viewBox="0 0 224 224" style="display:block">'
        f'<rect width="224" height="224" fill="{background}"/>{shapes}</svg></body>'
    )


# ── web pages with large words ────────────────────────────────────────────────────────────────────────────────────────

PAGES = {
    "page_hello": (
        page('<h1 style="font-size:56px">HELLO</h1>', CENTERED),
        [equals("What does it say?", "HELLO")],
    ),
    "page_sale": (
        page('<b style="font-size:64px;color:white">SALE</b>', f"{CENTERED};background:#c8102e"),
        [equals("What is written here?", "SALE"), equals("What color is the text?", "white")],
    ),
    "page_open_sign": (
        page(
            '<div style="border:4px solid #0a6;border-radius:14px;padding:14px 20px;color:#0a6;font-size:48px">'
            "OPEN</div>",
            CENTERED,
        ),
        [equals("What does the sign say?", "OPEN")],
    ),
    "page_error": (
        page('<div><div style="font-size:84px;font-weight:bold">404</div>page not found</div>', CENTERED),
        [equals("What number do you see?", "404"), equals("What does the text at the top say?", "404")],
    ),
    "page_menu": (
        page(
            '<div style="background:#222;color:white;font-size:40px;padding:12px">MENU</div>'
            '<p style="margin:14px;font-size:15px">Soup of the day<br>Bread and butter<br>Apple cake</p>',
            font=SERIF,
        ),
        [equals("What does the text at the top say?", "MENU")],
    ),
    "page_login": (
        page(
            '<div style="width:170px;text-align:left"><b style="font-size:38px">LOGIN</b>'
            '<input style="width:160px;margin:10px 0">'
            '<button style="background:#06c;color:white;border:0;padding:8px 16px">go</button></div>',
            CENTERED,
        ),
        [equals("What text do you see?", "LOGIN")],
    ),
    "page_dark_news": (
        page('<b style="font-size:58px;color:#ffd700">NEWS</b>', f"{CENTERED};background:#111", SERIF),
        [equals("What does the text say?", "NEWS"), equals("What color is the text?", "yellow")],
    ),
    "page_exit": (
        page('<b style="font-size:66px;color:white;letter-spacing:4px">EXIT</b>', f"{CENTERED};background:#008000"),
        [equals("Read the text.", "EXIT")],
    ),
    "page_clock": (
        page('<b style="font-size:62px;color:#00b000">1235</b>', f"{CENTERED};background:black", MONO),
        [equals("What number does the display show?", "1235")],
    ),
    "page_two_words": (
        page(
            '<div style="font-size:44px;color:#d00;padding:26px 20px 40px">STOP</div>'
            '<div style="font-size:44px;color:#00c;padding:0 90px">WAIT</div>'
        ),
        [equals("What does the red text say?", "STOP"), equals("What does the blue text say?", "WAIT")],
    ),
    "page_button": (
        page(
            '<button style="font-size:40px;background:#f59;color:black;border:0;border-radius:30px;padding:16px 28px">'
            "PLAY</button>",
            CENTERED,
        ),
        [equals("What does it say?", "PLAY")],
    ),
    "page_mixed_case": (
        page('<h1 style="font-size:44px">Welcome</h1>', CENTERED),
        [equals("What does it say?", "Welcome", "WELCOME")],
    ),
    "page_code": (
        page('<span style="font-size:44px">K7PX2</span>', f"{CENTERED};background:#eef", MONO),
        [equals("Which characters do you see in the text?", "K7PX2")],
    ),
    "page_price": (
        page(
            '<div>coffee<div style="font-size:76px;font-weight:bold;color:#a30">35</div>each</div>',
            f"{CENTERED};background:#fff3d6",
            SERIF,
        ),
        [equals("What number is written in the middle?", "35")],
    ),
    "page_taxi": (
        page(
            '<b style="font-size:60px;background:black;color:#fc0;padding:6px 14px">TAXI</b>',
            f"{CENTERED};background:#fc0",
        ),
        [equals("What does the sign say?", "TAXI")],
    ),
}

# ── plain coloured objects ────────────────────────────────────────────────────────────────────────────────────────────


def star(x: float, y: float, r: float, fill: str) -> str:
    points = "0,-1 .235,-.324 .951,-.309 .38,.124 .588,.809 0,.4 -.588,.809 -.38,.124 -.951,-.309 -.235,-.324"
    return f'<polygon transform="translate({x} {y}) scale({r})" points="{points}" fill="{fill}"/>'


def circle(x: float, y: float, r: float, fill: str, rest: str = "") -> str:
    return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}" {rest}/>'


def square(x: float, y: float, side: float, fill: str) -> str:
    return f'<rect x="{x - side / 2}" y="{y - side / 2}" width="{side}" height="{side}" fill="{fill}"/>'


def triangle(x: float, y: float, r: float, fill: str) -> str:
    return f'<polygon points="{x},{y - r} {x + r},{y + 0.8 * r} {x - r},{y + 0.8 * r}" fill="{fill}"/>'


def heart(x: float, y: float, r: float, fill: str) -> str:
    path = "M0,.9 C-1.4,-.1 -.8,-1.1 0,-.4 C.8,-1.1 1.4,-.1 0,.9Z"
    return f'<path transform="translate({x} {y}) scale({r})" d="{path}" fill="{fill}"/>'


OBJECTS = {
    "one_red_circle": (
        svg(circle(112, 112, 50, "red")),
        [equals("What color is the circle?", "red"), equals("How many objects are there?", "1", "one")],
    ),
    "one_blue_square": (
        svg(square(112, 112, 90, "#0044cc"), "#f4f0e0"),
        [equals("What shape is the blue object?", "square"), equals("Is there a red square?", "no")],
    ),
    "three_shapes": (
        svg(circle(40, 40, 24, "green") + square(112, 112, 48, "orange") + triangle(182, 182, 26, "purple")),
        [
            equals("How many shapes are there?", "3", "three"),
            equals("Where is the square?", "center", "middle"),
            equals("What color is the triangle?", "purple"),
        ],
    ),
    "two_stars": (
        svg(star(56, 112, 34, "gold") + star(168, 112, 34, "blue"), "#dde6dd"),
        [equals("How many stars are there?", "2", "two"), equals("Is the yellow star left of the blue star?", "yes")],
    ),
    "heart_on_blue": (
        svg(heart(112, 112, 60, "#d00020"), "#cfe8ff"),
        [equals("What is this?", "heart", "red heart", "a red heart", "a heart", "large red heart")],
    ),
    "four_corners": (
        svg(
            circle(36, 36, 20, "red")
            + square(188, 36, 40, "blue")
            + triangle(36, 188, 22, "green")
            + star(188, 188, 26, "orange")
        ),
        [
            equals("Where is the star?", "bottom right"),
            equals("What is the green object?", "triangle", "green triangle"),
            equals("How many objects are there?", "4", "four"),
        ],
    ),
    "six_dots": (
        svg("".join(circle(40 + 72 * (i % 3), 76 + 72 * (i // 3), 20, "black") for i in range(6)), "#e8e8e8"),
        [equals("How many circles are there?", "6", "six")],
    ),
    "big_and_small": (
        svg(circle(70, 120, 44, "purple") + circle(176, 120, 13, "green"), "white"),
        [equals("What size is the green circle?", "small"), equals("What size is the purple circle?", "large", "big")],
    ),
    "above_below": (
        svg(square(112, 50, 50, "red") + heart(112, 172, 32, "blue"), "#ddd"),
        [equals("Is the heart above the square?", "no"), equals("Where is the heart?", "bottom center", "bottom")],
    ),
    "ring_gradient": (
        '<body style="margin:0;width:224px;height:224px;background:linear-gradient(#fff,#9cf)">'
        '<div style="position:absolute;left:52px;top:52px;width:60px;height:60px;border:30px solid #e07000;'
        'border-radius:50%"></div></body>',
        [
            equals("What shape do you see?", "ring", "circle", "orange ring"),
            equals("What color is the ring?", "orange"),
        ],
    ),
}

# ── simple drawings and icons ─────────────────────────────────────────────────────────────────────────────────────────

DRAWINGS = {
    "drawing_house": (
        svg(
            square(112, 146, 100, "yellow")
            + '<polygon points="112,24 186,96 38,96" fill="red"/>'
            + '<rect x="98" y="150" width="28" height="46" fill="#333"/>',
            "#bfe3ff",
        ),
        [equals("What color is the triangle?", "red")],
    ),
    "drawing_traffic_light": (
        svg(
            '<rect x="72" y="12" width="80" height="200" rx="14" fill="#333"/>'
            + circle(112, 48, 24, "red")
            + circle(112, 112, 24, "yellow")
            + circle(112, 176, 24, "#00b050")
        ),
        [
            equals("How many circles are there?", "3", "three"),
            equals("Where is the green circle?", "bottom center", "bottom"),
            equals("Is the red circle above the yellow circle?", "yes"),
        ],
    ),
    "icon_play": (
        svg(circle(112, 112, 84, "#e02020") + '<polygon points="88,68 88,156 160,112" fill="white"/>'),
        [equals("What color is the triangle?", "white"), equals("Is there a white triangle?", "yes")],
    ),
    "icon_plus": (
        svg(
            '<rect x="88" y="40" width="48" height="144" fill="#0a0"/>'
            '<rect x="40" y="88" width="144" height="48" fill="#0a0"/>'
        ),
        [equals("What shape is this?", "cross", "plus", "green cross", "a cross")],
    ),
    "flag_one_circle": (
        svg('<rect x="12" y="44" width="200" height="136" fill="white"/>' + circle(112, 112, 40, "#bc002d"), "#8aa"),
        [says("Describe the image.", "red circle", "center", at_most=2)],
    ),
    "flag_white_cross": (
        svg(
            '<rect x="94" y="48" width="36" height="128" fill="white"/>'
            '<rect x="48" y="94" width="128" height="36" fill="white"/>',
            "#d52b1e",
        ),
        [equals("What color is the cross?", "white"), equals("What is this?", "cross", "white cross", "a white cross")],
    ),
    "road_sign_stop": (
        svg(
            '<polygon points="72,16 152,16 208,72 208,152 152,208 72,208 16,152 16,72" fill="#c00"/>'
            '<text x="112" y="130" font-family="Liberation Sans" font-weight="bold" font-size="54" fill="white" '
            'text-anchor="middle">STOP</text>'
        ),
        [equals("What does the sign say?", "STOP")],
    ),
    "target": (
        svg(circle(112, 112, 92, "red") + circle(112, 112, 62, "white") + circle(112, 112, 32, "red")),
        [equals("What shapes do you see?", "circle", "circles", "ring", "rings", "red circle", "red ring, red circle")],
    ),
    "smiley": (
        svg(
            circle(112, 112, 90, "#ffd800")
            + circle(80, 88, 12, "black")
            + circle(144, 88, 12, "black")
            + '<path d="M64 136 Q112 190 160 136" fill="none" stroke="black" stroke-width="10"/>'
        ),
        [says("Describe the image.", "yellow circle", at_most=4), equals("Is there a yellow circle?", "yes")],
    ),
    "sun_and_tree": (
        svg(
            circle(178, 44, 28, "#ffd800")
            + '<rect x="58" y="130" width="20" height="64" fill="#7a4a20"/>'
            + triangle(68, 92, 50, "green"),
            "#cdeeff",
        ),
        [equals("Where is the yellow circle?", "top right"), equals("What color is the triangle?", "green")],
    ),
    "playing_card": (
        svg(
            '<rect x="42" y="12" width="140" height="200" rx="12" fill="white" stroke="#555" stroke-width="3"/>'
            + '<polygon points="112,62 146,112 112,162 78,112" fill="#d00"/>',
            "#2a6e4a",
        ),
        [equals("What shape is the red object?", "diamond"), equals("What color is the diamond?", "red")],
    ),
    "domino": (
        svg(
            '<rect x="52" y="12" width="120" height="200" rx="12" fill="white" stroke="black" stroke-width="4"/>'
            '<line x1="60" y1="112" x2="164" y2="112" stroke="black" stroke-width="4"/>'
            + circle(112, 62, 14, "black")
            + circle(84, 140, 14, "black")
            + circle(140, 184, 14, "black"),
            "#c8b890",
        ),
        [equals("How many black circles are there?", "3", "three")],
    ),
}

# ── charts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bars(axes: plt.Axes) -> None:
    found = axes.bar(["A", "B", "C"], [3, 8, 5], color=["red", "blue", "green"])
    axes.bar_label(found, fontsize=18)
    axes.set_ylim(0, 10)
    axes.tick_params(labelsize=16)
    axes.set_yticks([])


def bars_two(axes: plt.Axes) -> None:
    found = axes.bar(["A", "B"], [42, 17], color=["tab:orange", "tab:purple"], width=0.6)
    axes.bar_label(found, fontsize=18)
    axes.axis("off")


def markers(axes: plt.Axes) -> None:
    for x, y, marker, color in ((1, 3, "o", "red"), (3, 3, "s", "blue"), (2, 1, "*", "black")):
        axes.plot(x, y, marker, color=color, markersize=36, markeredgewidth=0)
    axes.set(xlim=(0, 4), ylim=(0, 4), xticks=[], yticks=[])


def big_number(axes: plt.Axes) -> None:
    axes.text(0.5, 0.5, "27", fontsize=72, ha="center", va="center", color="blue", family="DejaVu Serif")
    axes.axis("off")


CHARTS: dict[str, tuple[Callable[[plt.Axes], None], list[dict]]] = {
    "chart_three_bars": (
        bars,
        [
            equals("Which bar is the highest?", "blue", "B", "the blue bar", "the blue one"),
            equals("How many bars are there?", "3", "three"),
            equals("What is the value of the red bar?", "3", "three"),
        ],
    ),
    "chart_two_bars": (
        bars_two,
        [
            equals("Which bar is the lowest?", "purple", "B", "the purple bar"),
            equals("What is the value of the orange bar?", "42"),
        ],
    ),
    "chart_markers": (
        markers,
        [equals("What color is the star?", "black"), equals("Is the square right of the circle?", "yes")],
    ),
    "chart_number": (big_number, [equals("What number do you see?", "27")]),
}


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rendered(browser_page: Page, markup: str) -> Image.Image:
    browser_page.set_content(f"<!doctype html><html>{markup}</html>")
    return Image.open(io.BytesIO(browser_page.screenshot())).convert("RGB")


def plotted(draw: Callable[[plt.Axes], None]) -> Image.Image:
    figure, axes = plt.subplots(figsize=(2.24, 2.24), dpi=100)
    draw(axes)
    figure.tight_layout(pad=0.6)
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return Image.open(file).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    if image.size != (SIDE_PX, SIDE_PX):
        raise ValueError(f"{name} came out as {image.size}")
    if len(image.getcolors(SIDE_PX * SIDE_PX) or ()) <= 256:  # a palette says the same in fewer bytes
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    image.save(FOLDER / f"{name}.png", optimize=True)


def main() -> None:
    lines = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        browser_page = browser.new_page(viewport={"width": SIDE_PX, "height": SIDE_PX})
        for kind, pictures in (("web page", PAGES), ("objects", OBJECTS), ("drawing", DRAWINGS)):
            for name, (markup, questions) in pictures.items():
                save(rendered(browser_page, markup), name)
                lines += [{"file": f"{name}.png", "kind": kind, **question} for question in questions]
        browser.close()
    for name, (draw, questions) in CHARTS.items():
        save(plotted(draw), name)
        lines += [{"file": f"{name}.png", "kind": "chart", **question} for question in questions]
    (FOLDER / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
