"""The page in a real headless browser: ask, compare, look at the map; and nothing leaves the machine."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from serve.page.client import Client
from serve.page.launch import DemoConfig, demo_app, mounted, serving
from serve.page.page import build_page
from serve.page.samples import load_samples
from tests.serve.page.fake_server import FRAME_GRID, GRID, fake_app, kept_indices

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
DIM = np.array([15, 23, 42])
"""The colour that dropped cells fade to."""

pytestmark = [
    pytest.mark.page,
    # Gradio sets an option of pandas that pandas means to drop.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.usefixtures("no_outbound"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: chromium, chromium-browser or google-chrome in PATH"),
]
needs_samples = pytest.mark.skipif(not load_samples(), reason="demos/samples is not here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    """The page in front of the stand-in."""
    with serving(fake_app()) as server, demo_app(DemoConfig(url=server)) as app, serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def tiny_url() -> Iterator[str]:
    """The page as `mm demo` starts it: the shipped model in this process."""
    with demo_app(DemoConfig()) as app, serving(app) as url:
        yield url


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; afterwards, everything it asked for was on this machine and its console is free of errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(60_000)
    hosts: list[str | None] = []
    errors: list[str] = []

    def open_(url: str) -> Any:
        page = context.new_page()
        page.on("request", lambda request: hosts.append(_host(request.url)))
        page.on("websocket", lambda socket: hosts.append(_host(socket.url)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".mm-server")
        return page

    yield open_
    context.close()
    assert set(hosts) == {"127.0.0.1"}
    assert errors == []


def _host(url: str) -> str | None:
    parts = urlsplit(url)
    return parts.hostname if parts.scheme in ("http", "https", "ws", "wss") else "127.0.0.1"  # data: and blob:


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#mm-file input[type=file]", str(path))
    page.wait_for_selector("#mm-shown img, #mm-shown .mm-error")


def ask(page: Any, question: str) -> None:
    page.fill("#mm-question textarea", question)
    page.click("#mm-ask")
    page.wait_for_selector("#mm-reduced .mm-answer, #mm-reduced .mm-error")


def write_reducer(page: Any, specification: str) -> None:
    page.fill("#mm-reducer input", specification)
    page.keyboard.press("Enter")


def pixels(locator: Any) -> np.ndarray:
    """What the browser shows of an element, as float (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"), float)


def set_dimming(page: Any, value: float) -> None:
    slider = page.locator("#mm-kept input[type=range]")
    slider.evaluate(f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }}")


def cell_centres(shown: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(h * w, 3): the mean colour in the middle of each cell."""
    h, w = grid
    ys = ((np.arange(h) + 0.5) * shown.shape[0] / h).astype(int)
    xs = ((np.arange(w) + 0.5) * shown.shape[1] / w).astype(int)
    return np.array([shown[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1)) for y in ys for x in xs])


def test_a_picture_is_answered_twice_by_the_shipped_model(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    assert "tiny at http://127.0.0.1:" in page.inner_text(".mm-server")
    upload(page, picture)
    ask(page, "What colour is the picture?")
    assert page.inner_text("#mm-full .mm-answer").strip()
    assert page.inner_text("#mm-reduced .mm-answer").strip()
    assert "256 of 256 visual tokens" in page.inner_text("#mm-full")
    assert "64 of 256 visual tokens" in page.inner_text("#mm-reduced")
    for stage in ("load", "encode", "reduce", "prefill", "decode"):
        assert page.locator(f"#mm-reduced dt:text-is('{stage}')").is_visible()
    shown = page.locator("#mm-kept .mm-pic")
    assert shown.is_visible()
    dimmed = pixels(shown)
    set_dimming(page, 0)
    assert np.abs(pixels(shown) - dimmed).mean() > 30
    page.get_by_text("The reduced question as curl").click()
    page.wait_for_selector("#mm-curl >> text=a bright picture.png")


@needs_samples
def test_drafted_text_has_a_colour_and_the_answer_is_the_same_without(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    sample = next(sample for sample in load_samples() if sample.path.name == "many_shapes.png")
    upload(page, sample.path)
    assert page.input_value("#mm-drafter input") == "flash"
    ask(page, "Describe the picture.")
    answer = page.locator("#mm-full .mm-answer")
    marked = answer.locator("mark.mm-drafted")
    assert marked.count() > 0
    colour = "e => getComputedStyle(e).backgroundColor"
    assert marked.first.evaluate(colour) != answer.evaluate(colour)
    reported = page.inner_text("#mm-full .mm-drafting")
    found = re.search(r"(\d+) of (\d+) tokens. Mean accepted length (\d+\.\d+)", reported)
    assert found, reported
    assert 0 < int(found[1]) < int(found[2])
    assert 1 < float(found[3]) < 16
    text = page.inner_text("#mm-full .mm-answer")
    page.click("#mm-drafter input")
    page.get_by_role("option", name="none", exact=True).click()
    page.click("#mm-ask")
    page.wait_for_function("!document.querySelector('mark') && document.querySelector('#mm-reduced .mm-answer')")
    assert page.inner_text("#mm-full .mm-answer") == text


@needs_samples
def test_a_clip_gets_a_map_per_frame_from_the_shipped_model(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    clip = next(sample for sample in load_samples() if sample.path.suffix == ".mp4")
    upload(page, clip.path)
    assert page.locator("#mm-shown figure").count() == 8
    assert page.locator("#mm-frames").is_visible()
    ask(page, clip.question)
    assert page.inner_text("#mm-full .mm-answer").strip()
    maps = page.locator("#mm-kept figure")
    assert maps.count() == 8
    kept = [int(caption.split("·")[1].split()[0]) for caption in page.locator("#mm-kept figcaption").all_inner_texts()]
    assert f"{sum(kept)} of 512 visual tokens" in page.inner_text("#mm-reduced")
    assert sum(kept) == 128


def test_a_broken_file_is_explained_on_the_page(open_page: Any, tiny_url: str, broken: Path) -> None:
    page = open_page(tiny_url)
    upload(page, broken)
    assert "cannot be decoded" in page.inner_text("#mm-shown .mm-error")
    ask(page, "What is this?")
    for card in ("#mm-full", "#mm-reduced"):
        assert "The image cannot be decoded" in page.inner_text(f"{card} .mm-error")
        assert "status 400, media_undecodable" in page.inner_text(f"{card} .mm-error")
    assert not page.locator("#mm-kept").is_visible()


def test_a_wrong_option_is_explained_and_the_full_answer_stays(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    write_reducer(page, "divprune:keep_rato=0.5")
    ask(page, "What is this?")
    assert page.inner_text("#mm-full .mm-answer").strip()
    assert "did you mean 'keep_ratio'" in page.inner_text("#mm-reduced .mm-error")


def test_the_map_dims_the_dropped_cells_and_no_other(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    write_reducer(page, "uniform")
    ask(page, "What?")
    shown = page.locator("#mm-kept .mm-pic")
    set_dimming(page, 0.5)
    dimmed = cell_centres(pixels(shown), GRID)
    set_dimming(page, 0)
    plain = cell_centres(pixels(shown), GRID)
    assert plain.min() > 100
    kept = np.zeros(len(plain), bool)
    kept[kept_indices(len(plain), 0.25)] = True
    assert np.abs(dimmed[kept] - plain[kept]).max() < 2
    assert np.abs(dimmed[~kept] - (plain[~kept] + DIM) / 2).max() < 3


@needs_samples
def test_a_sample_brings_its_question_and_its_answer(open_page: Any, fake_url: str) -> None:
    page = open_page(fake_url)
    samples = load_samples()
    clip = next(i for i, sample in enumerate(samples) if sample.path.suffix == ".mp4")
    page.locator("#mm-samples .thumbnail-item").nth(clip).click()
    page.wait_for_selector("#mm-shown figure >> nth=7")
    assert page.input_value("#mm-question textarea") == samples[clip].question
    write_reducer(page, "uniform")
    page.click("#mm-ask")
    page.wait_for_selector("#mm-reduced .mm-answer")
    assert f"The right answer: {samples[clip].answer}" in page.inner_text("#mm-full")
    cells = FRAME_GRID[0] * FRAME_GRID[1]
    assert page.locator(f"#mm-kept figcaption:has-text('{cells // 4} of {cells} kept')").count() == 8


def test_what_a_model_writes_stays_text(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    write_reducer(page, "uniform")
    text = "![a](http://example.org/a.png) <img src=http://example.org/b.png onerror=alert(1)> ${1 + 1} {{ 1 }}"
    ask(page, text)
    assert page.inner_text("#mm-full .mm-answer") == f"none: {text}"
    assert page.locator("#mm-full img").count() == 0


def test_a_server_that_is_not_there_is_explained(open_page: Any, picture: Path) -> None:
    client = Client("http://127.0.0.1:9")
    config = DemoConfig(url=client.url)
    with serving(mounted(build_page(client, samples=()), config)) as url:
        page = open_page(url)
        assert "No server can be reached at http://127.0.0.1:9" in page.inner_text(".mm-server")
        upload(page, picture)
        ask(page, "What?")
        assert "mm serve" in page.inner_text("#mm-full .mm-error")
        assert page.locator("#mm-samples").count() == 0
    client.close()


def test_nothing_chosen_is_explained(open_page: Any, fake_url: str) -> None:
    page = open_page(fake_url)
    page.click("#mm-ask")
    page.wait_for_selector("#mm-full .mm-error")
    assert "Choose an image or a clip first" in page.inner_text("#mm-full")


def test_options_of_the_chosen_reducer_are_offered_and_sent(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    assert not page.locator("#mm-options-random").is_visible()
    page.click("#mm-reducer input")
    page.get_by_role("option", name="random").click()
    page.wait_for_selector("#mm-options-random")
    assert page.locator("#mm-keep-ratio").is_visible()
    assert not page.locator("#mm-option-mustdrop-window").is_visible()
    page.fill("#mm-option-random-seed input", "5")
    upload(page, picture)
    ask(page, "What?")
    assert "random:seed=5" in page.inner_text("#mm-reduced")


def test_a_narrow_window_needs_no_sideways_scrolling(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    page.set_viewport_size({"width": 400, "height": 800})
    upload(page, picture)
    write_reducer(page, "uniform")
    ask(page, "What is in the picture?")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    left = page.locator("#mm-full .mm-card").bounding_box()
    right = page.locator("#mm-reduced .mm-card").bounding_box()
    assert left["y"] + left["height"] <= right["y"]


LOWEST_CONTRAST = """() => {
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4);
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const parse = s => { const m = s.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const behind = element => {
    const stack = [];
    for (let e = element; e; e = e.parentElement) stack.push(parse(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((base, c) => over(c, base), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, box = e.getBoundingClientRect();
    if (!walker.currentNode.textContent.trim() || !box.width || !box.height) continue;
    if (["STYLE", "SCRIPT", "NOSCRIPT"].includes(e.tagName)) continue;
    const back = behind(e), [a, b] = [light(over(parse(getComputedStyle(e).color), back)), light(back)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_four_and_a_half(open_page, fake_url, picture, theme):
    page = open_page(f"{fake_url}?__theme={theme}")
    upload(page, picture)
    ask(page, "What is it?")
    ratio, text = page.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text


def test_a_narrow_screen_shows_the_answers_and_has_small_margins(browser, fake_url, picture):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(fake_url)
    page.wait_for_selector(".mm-server")
    upload(page, picture)
    ask(page, "What is it?")
    box = page.locator("#mm-full").bounding_box()
    assert 0 <= box["y"] < 300
    assert box["x"] <= 16
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
