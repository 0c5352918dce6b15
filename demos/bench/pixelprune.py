"""What does `pixelprune` save of the encoder's time on screenshots and still clips, and what does it change?

    python -m demos.bench.pixelprune [--photographs FOLDER] [--out FILE]

Forty pages are rendered by Chromium (Playwright): web pages, tables and slides, with words and numbers of the kind that
the shipped model reads. Two towers take them: that of `tiny`, which brings every picture to 16 x 16 patches, and one of
Qwen2.5-VL's architecture with random weights, which takes the page at the size it was rendered, so that equal pixels
stay equal. Encoder seconds are CPU time of one thread, of what the processor made, with and without
`pixelprune:tau=0` in turns; comparing the pixels is part of it. `tiny` also answers a question about each page both
ways. Still clips are eight frames of a page, in half of them with a moving pointer.

Photographs: 200 crops of the files in `--photographs`, or of the two that scikit-learn brings, at several sizes. Of
each it is said whether its tokens are the same, bit for bit. Areas that are black or white to the last bit, such as the
border of a microscope's picture, are equal cells as on a page, and leave the tower too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

import mm
from demos.bench.machine import facts
from mm.config import MediaLimits, ModelConfig
from mm.data.media import Image, Video
from mm.encode.parts import EncodeParts
from mm.media import MediaBudget, image_from_array, video_from_array
from mm.plugins.spec import build_reducer
from serve.evaluation.report import markdown
from tests.helpers.checkpoints import random_qwen2_5_vl

WORDS = ("HELLO", "SALE", "OPEN", "EXIT", "TAXI", "MENU", "STOP", "NEWS", "CAFE", "BOOK", "HOTEL", "MUSIC", "PARK")
COLORS = {"black": "#111", "red": "#d22", "blue": "#22d", "green": "#1a1", "purple": "#81c"}
NUM_PAGES, NUM_PHOTOGRAPHS, NUM_CLIPS, NUM_FRAMES = 40, 200, 20, 8
SIDE, REPEATS = 448, 3
REDUCER = "pixelprune:tau=0"
STYLE = "body{margin:40px;font-family:sans-serif;background:#fff} td,th{border:2px solid #888;padding:10px 26px}"


@dataclass(frozen=True)
class Page:
    """A rendered page with a question about it.

    Attributes:
        pixels: (H, W, 3) uint8.
        answer: What is right.
    """

    kind: str
    pixels: np.ndarray
    question: str
    answer: str


def sources() -> list[tuple[str, str, str, str]]:
    """Kind, HTML, question and answer of each page."""
    found = []
    for i in range(NUM_PAGES):
        word, (color, code) = WORDS[i % len(WORDS)], list(COLORS.items())[i % len(COLORS)]
        number = str(101 + 37 * i)[-3:]
        lines = "".join(f"<p>{'The quick brown fox jumps over the lazy dog. ' * (1 + i % 3)}</p>" for _ in range(i % 4))
        head = f"<h1 style='font-size:{110 + 5 * (i % 4)}px;color:{code};text-align:center'>"
        if i % 3 == 0:
            nav = (
                "<div style='background:#eee;padding:14px;margin:-40px -40px 30px'>Home &nbsp; About &nbsp; Help</div>"
            )
            found.append(("page", f"{nav}{head}{word}</h1>{lines}", "What is written here?", word))
        elif i % 3 == 1:
            rows = "".join(f"<tr><td>{chr(65 + r)}{i}</td><td>{(r + 3) * i % 97}</td></tr>" for r in range(2 + i % 3))
            table = f"<table style='border-collapse:collapse;font-size:26px'>{rows}</table>"
            found.append(("table", f"{head}{number}</h1>{table}", "What number do you see?", number))
        else:
            shape = f"<div style='width:170px;height:170px;border-radius:50%;background:{code};margin:60px auto'></div>"
            found.append(("slide", f"{head}{word}</h1>{shape}", "What color is the circle?", color))
    return found


def pages() -> list[Page]:
    """The pages as Chromium shows them."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium())
        tab = browser.new_page(viewport={"width": SIDE, "height": SIDE})
        for kind, body, question, answer in sources():
            tab.set_content(f"<style>{STYLE}</style>{body}")
            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                tab.screenshot(path=file.name)
                pixels = np.asarray(PIL.Image.open(file.name).convert("RGB")).copy()
            found.append(Page(kind, pixels, question, answer))
        browser.close()
    return found


def _chromium() -> str | None:
    """Debian's Chromium where there is one; else Playwright's own."""
    path = Path("/usr/bin/chromium")
    return str(path) if path.exists() else None


def photographs(folder: Path | None) -> list[np.ndarray]:
    """Crops of photographs, each at a place and a size of its own."""
    if folder is None:
        import sklearn.datasets

        whole = [np.asarray(image) for image in sklearn.datasets.load_sample_images().images]
    else:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        whole = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in files]
    rng, found = np.random.default_rng(0), []
    for i in range(NUM_PHOTOGRAPHS):
        pixels = whole[i % len(whole)]
        height, width = (int(rng.integers(min(160, size), size + 1)) for size in pixels.shape[:2])
        top, left = (
            int(rng.integers(0, size - part + 1)) for size, part in zip(pixels.shape, (height, width), strict=False)
        )
        found.append(pixels[top : top + height, left : left + width].copy())
    return found


def clips(shown: Sequence[Page]) -> list[np.ndarray]:
    """(F, H, W, 3): pages that stand still, in half of them with a moving pointer."""
    found = []
    for i in range(NUM_CLIPS):
        frames = np.stack([shown[i].pixels] * NUM_FRAMES)
        if i % 2:
            for t in range(NUM_FRAMES):
                frames[t, 300 + 9 * t : 316 + 9 * t, 200 + 20 * t : 210 + 20 * t] = 0
        found.append(frames)
    return found


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pruned:
    """One item with and without `pixelprune`.

    Attributes:
        kept: Tokens kept / tokens.
        time: Encoder seconds / those without it.
        is_same: Whether the tokens are equal, bit for bit.
    """

    kept: float
    time: float
    is_same: bool


def pruned(parts: EncodeParts, item: Image | Video, repeats: int = REPEATS) -> Pruned:
    encoder: Any = parts.encoder
    prepared, dropping = encoder.prepare(item), build_reducer(REDUCER)
    options: list[dict[str, Any]] = [{}, {"dropping": dropping}]
    seconds: list[list[float]] = [[], []]
    found: list[Any] = [None, None]
    for _ in range(repeats):
        for which, option in enumerate(options):
            start = time.process_time()
            (found[which],) = encoder.encode([prepared], **option)
            seconds[which].append(time.process_time() - start)
    whole, left = found
    return Pruned(
        kept=left.num_tokens / whole.num_tokens,
        time=statistics.median(seconds[1]) / statistics.median(seconds[0]),
        is_same=torch.equal(whole.embeddings, left.embeddings),
    )


def as_image(pixels: np.ndarray) -> Image:
    return image_from_array(pixels, MediaBudget(MediaLimits()))


def as_clip(frames: np.ndarray) -> Video:
    times = [i / 2 for i in range(len(frames))]
    return video_from_array(frames, times, len(frames) / 2, MediaBudget(MediaLimits()))


def row_of(tower: str, what: str, found: Sequence[Pruned]) -> dict[str, Any]:
    return {
        "tower": tower,
        "items": f"{len(found)} {what}",
        "kept": statistics.median(one.kept for one in found),
        "time": statistics.median(one.time for one in found),
        "worst": max(one.time for one in found),
        "same": sum(one.is_same for one in found),
    }


def answers(model: mm.Model, shown: Sequence[Page]) -> dict[str, Any]:
    """How many answers of `tiny` are the same with and without, and how many are right."""
    texts = {
        reducer: [
            model.generate(page.question, images=[page.pixels], reducer=reducer, temperature=0, max_new_tokens=12).text
            for page in shown
        ]
        for reducer in ("none", REDUCER)
    }
    right = {
        reducer: {
            i for i, (page, text) in enumerate(zip(shown, of, strict=True)) if page.answer.lower() in text.lower()
        }
        for reducer, of in texts.items()
    }
    changed = [
        f"{page.kind}: {page.question} {a.strip()!r} -> {b.strip()!r}"
        for page, a, b in zip(shown, texts["none"], texts[REDUCER], strict=True)
        if a != b
    ]
    return {
        "asked": len(shown),
        "same": len(shown) - len(changed),
        "right": {reducer: len(found) for reducer, found in right.items()},
        "stayed_right": len(right["none"] & right[REDUCER]),
        "changed": changed,
    }


def report(rows: Sequence[dict[str, Any]], asked: dict[str, Any]) -> str:
    table = markdown(
        ["tower", "items", "kept, median", "encoder's time, median", "largest", "same tokens, bit for bit"],
        [
            [
                row["tower"],
                row["items"],
                f"{row['kept']:.0%}",
                f"{row['time']:.2f}",
                f"{row['worst']:.2f}",
                str(row["same"]),
            ]
            for row in rows
        ],
    )
    right = ", ".join(f"`{reducer}` {count}" for reducer, count in asked["right"].items())
    return (
        f"{table}\n\n`tiny`, {asked['asked']} questions: {asked['same']} answers the same; right: {right}; "
        f"{asked['stayed_right']} right both ways."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, help="folder of JPEG or PNG files")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shown, photos = pages(), photographs(args.photographs)
    model = mm.Model(ModelConfig(dtype="float32", num_threads=1, cache_bytes=0, prefix_caching=False))
    with tempfile.TemporaryDirectory() as folder:
        tower = {
            "hidden_size": 320,
            "intermediate_size": 864,
            "depth": 4,
            "num_heads": 5,
            "fullatt_block_indexes": [1, 3],
        }
        path = random_qwen2_5_vl(Path(folder), tower=tower | {"window_size": 112}, max_tokens=1024)
        native = mm.build.build_encode_parts(ModelConfig(model=str(path), dtype="float32", num_threads=1))
        rows = []
        for name, parts in (("tiny", model.encode_parts), ("Qwen2.5-VL", native)):
            rows.append(row_of(name, "screenshots", [pruned(parts, as_image(page.pixels)) for page in shown]))
            rows.append(row_of(name, "photographs", [pruned(parts, as_image(pixels), 1) for pixels in photos]))
            rows.append(row_of(name, "still clips", [pruned(parts, as_clip(frames), 1) for frames in clips(shown)]))
            print(rows[-3:], flush=True)
        asked = answers(model, shown)
    text = report(rows, asked)
    print(text, *asked["changed"], sep="\n")
    if args.out:
        args.out.write_text(f"{text}\n\n{json.dumps(facts() | {'rows': rows, 'answers': asked})}\n")
    model.close()


if __name__ == "__main__":
    main()
