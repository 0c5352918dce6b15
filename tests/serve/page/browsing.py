"""What tests of the page in a browser share: how to find one, and what a visitor does."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.page.samples import load_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
DIM = np.array([15, 23, 42])
"""The colour that dropped cells fade to."""

MARKS = [
    pytest.mark.page,
    # Gradio sets an option of pandas that pandas means to drop.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.usefixtures("no_outbound"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: chromium, chromium-browser or google-chrome in PATH"),
]
needs_samples = pytest.mark.skipif(not load_samples(), reason="demos/samples is not here")


def take_away(page: Any) -> None:
    """The file, if one is chosen."""
    clear = page.locator("#mm-file button[aria-label=Clear]")
    if clear.count():
        clear.click()
        page.wait_for_selector("#mm-shown img, #mm-shown .mm-error", state="detached")


def upload(page: Any, path: Path) -> None:
    """Choose a file in place of the one that is there."""
    take_away(page)
    page.set_input_files("#mm-file input[type=file]", str(path))
    page.wait_for_selector("#mm-shown img, #mm-shown .mm-error")


def ask(page: Any, question: str, *, click: str = "#mm-ask") -> None:
    page.fill("#mm-question textarea", question)
    answered(page, click)


def answered(page: Any, click: str = "#mm-ask") -> None:
    """Click, and wait for all answers."""
    page.evaluate("document.querySelector('#mm-status').querySelectorAll('*').forEach(e => e.dataset.old = 1)")
    page.click(click)
    page.wait_for_function(
        """() => !document.querySelector('.mm-busy, .mm-growing') && (
            /answers\\.$/.test(document.querySelector('#mm-status .mm-status:not([data-old])')?.innerText || '')
            || document.querySelector('#mm-status .mm-error:not([data-old])'))"""
    )


def choose(page: Any, *names: str) -> None:
    """Choose these methods and no others."""
    for box in page.locator("#mm-methods input:checked").all():
        box.uncheck()
    for name in names:
        page.locator(f"#mm-methods input[value={name}]").check()


def write_methods(page: Any, *specifications: str) -> None:
    choose(page)
    page.fill("#mm-written textarea", "\n".join(specifications))


def pixels(locator: Any) -> np.ndarray:
    """What the browser shows of an element, as float (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), float)


def set_dimming(page: Any, value: float) -> None:
    slider = page.locator(".mm-dim input[type=range]")
    slider.evaluate(f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }}")


def cell_centres(shown: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(h * w, 3): the mean colour in the middle of each cell."""
    h, w = grid
    ys = ((np.arange(h) + 0.5) * shown.shape[0] / h).astype(int)
    xs = ((np.arange(w) + 0.5) * shown.shape[1] / w).astype(int)
    return np.array([shown[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1)) for y in ys for x in xs])


FULL, FIRST = ".mm-card >> nth=0", ".mm-card >> nth=1"
"""The card with every token, and that of the first method."""


def write_methods_beside(page: Any, *specifications: str) -> None:
    page.fill("#mm-written textarea", "\n".join(specifications))
