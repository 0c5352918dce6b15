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


def test_any_number_of_methods_stand_beside_every_token(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    assert "tiny at http://127.0.0.1:" in page.inner_text(".mm-server")
    upload(page, picture)
    choose(page, "divprune", "fastv", "pool2")
    write_methods_beside(page, "divprune:keep_ratio=0.1")
    ask(page, "What colour is the picture?")
    assert page.locator(".mm-card h2").all_inner_texts() == [
        "Every token",
        "divprune",
        "pool2",
        "fastv",
        "divprune:keep_ratio=0.1",
    ]
    assert all(text.strip() for text in page.locator(".mm-card .mm-answer").all_inner_texts())
    kept = [
        re.search(r"(\d+)\s+of 256 visual", text)[1] for text in page.locator(".mm-card .mm-meter").all_inner_texts()
    ]
    assert kept == ["256", "64", "64", "64", "26"]
    assert page.locator(".mm-savings tbody tr").count() == 4
    cells = page.locator(".mm-savings tbody tr >> nth=0").locator("td").all_inner_texts()
    assert cells[0] == "192"
    assert re.fullmatch(r"[1-9]\d* KiB", cells[1])
    assert re.fullmatch(r"−?[\d.,]+ ms", cells[2])
    for stage in ("load", "encode", "reduce", "prefill", "decode"):
        assert page.locator(FIRST).locator(f"dt:text-is('{stage}')").is_visible()
    bars = sum(
        float(text.split()[0].replace(",", "")) for text in page.locator(FIRST).locator(".mm-ms").all_inner_texts()
    )
    total = float(page.locator(FIRST).locator(".mm-headline").inner_text().split()[0].replace(",", ""))
    assert abs(bars - total) < 4  # each is rounded to a millisecond
    shown = page.locator(FIRST).locator(".mm-pic")
    dimmed = pixels(shown)
    set_dimming(page, 0)
    assert np.abs(pixels(shown) - dimmed).mean() > 30


def write_methods_beside(page: Any, *specifications: str) -> None:
    page.fill("#mm-written textarea", "\n".join(specifications))


def test_a_repeated_question_is_cold_on_all_sides(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    for _ in range(2):
        ask(page, "Which colour?")
        for card in (FULL, FIRST):
            text = page.inner_text(card)
            assert "cached" not in text
            assert "in its cache" not in text


@needs_samples
def test_drafted_text_has_a_colour_and_the_answer_is_the_same_without(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    sample = next(sample for sample in load_samples() if sample.path.name == "many_shapes.png")
    upload(page, sample.path)
    page.get_by_text("Drafting and sampling").click()
    assert page.input_value("#mm-drafter input") == "flash"
    ask(page, "Describe the picture.")
    answer = page.locator(FULL).locator(".mm-answer")
    marked = answer.locator("mark.mm-drafted")
    assert marked.count() > 0
    colour = "e => getComputedStyle(e).backgroundColor"
    assert marked.first.evaluate(colour) != answer.evaluate(colour)
    reported = page.locator(FULL).locator(".mm-drafting").inner_text()
    found = re.search(r"(\d+) of (\d+) tokens; mean accepted length (\d+\.\d+)", reported)
    assert found, reported
    assert 0 < int(found[1]) < int(found[2])
    assert 1 < float(found[3]) < 16
    text = answer.inner_text()
    page.click("#mm-drafter input")
    page.get_by_role("option", name="none", exact=True).click()
    answered(page)
    assert page.locator("mark.mm-drafted").count() == 0
    assert answer.inner_text() == text


@needs_samples
def test_a_clip_has_its_kept_tokens_per_frame_on_a_time_line(open_page: Any, tiny_url: str) -> None:
    page = open_page(tiny_url)
    clip = next(sample for sample in load_samples() if sample.path.suffix == ".mp4")
    upload(page, clip.path)
    assert page.locator("#mm-shown figure").count() == 8
    assert page.locator("#mm-frames").is_visible()
    choose(page, "evs", "cubes")
    ask(page, clip.question)
    cubes, evs = page.locator(".mm-card").nth(1), page.locator(".mm-card").nth(2)
    assert evs.locator("figure").count() == 8
    captions = evs.locator("figcaption").all_inner_texts()
    kept = [int(caption.split("·")[1].split()[0]) for caption in captions]
    assert sum(kept) == 128
    assert "128 of 512 visual tokens" in evs.inner_text()
    line = [bar.bounding_box()["height"] for bar in evs.locator(".mm-shares b").all()]
    assert np.corrcoef(line, kept)[0, 1] > 0.99
    borders = cubes.locator(".mm-timeline i")
    assert borders.count() > 1
    assert borders.nth(0).bounding_box()["x"] < borders.nth(1).bounding_box()["x"]
    assert "cube 1 begins" in cubes.inner_text()


def test_a_broken_file_is_explained_on_the_page(open_page: Any, tiny_url: str, broken: Path) -> None:
    page = open_page(tiny_url)
    upload(page, broken)
    assert "cannot be decoded" in page.inner_text("#mm-shown .mm-error")
    ask(page, "What is this?")
    for card in (FULL, FIRST):
        assert "The image cannot be decoded" in page.inner_text(card)
        assert "status 400, media_undecodable" in page.inner_text(card)


def test_a_wrong_option_is_explained_and_the_full_answer_stays(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    write_methods(page, "divprune:keep_rato=0.5")
    ask(page, "What is this?")
    assert page.locator(FULL).locator(".mm-answer").inner_text().strip()
    assert "did you mean 'keep_ratio'" in page.locator(FIRST).locator(".mm-error").inner_text()


def test_the_map_dims_the_dropped_cells_and_no_other(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What?")
    shown = page.locator(FIRST).locator(".mm-pic")
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
    choose(page, "uniform")
    answered(page)
    assert f"The right answer: {samples[clip].answer}" in page.inner_text(FULL)
    cells = FRAME_GRID[0] * FRAME_GRID[1]
    assert page.locator(FIRST).locator(f"figcaption:has-text('{cells // 4} of {cells} kept')").count() == 8


def test_what_a_model_writes_stays_text_and_differing_words_are_marked(open_page, fake_url, picture) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    text = "![a](http://example.org/a.png) <img src=http://example.org/b.png onerror=alert(1)> ${1 + 1} {{ 1 }}"
    ask(page, text)
    assert page.locator(FULL).locator(".mm-answer").inner_text() == f"none: {text}"
    assert page.locator("#mm-answers img").count() == 0
    assert page.locator(FULL).locator(".mm-differs").count() == 0
    differing = page.locator(FIRST).locator(".mm-differs")
    assert differing.all_inner_texts() == ["uniform:"]
    assert "wavy" in differing.evaluate("e => getComputedStyle(e).textDecorationStyle")


def test_answers_stream_and_stop_ends_them(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "uniform")
    page.fill("#mm-question textarea", "Go on slowly")
    page.click("#mm-ask")
    growing = page.locator(".mm-growing")
    page.wait_for_function("document.querySelector('.mm-growing')?.innerText.includes('on on')")
    before = len(growing.inner_text())
    page.wait_for_function(f"document.querySelector('.mm-growing').innerText.length > {before}")
    page.click("#mm-stop")
    page.wait_for_selector(".mm-card >> nth=1 >> text=Stopped before an answer came")
    assert "on on" in page.inner_text(FULL)
    assert page.locator(".mm-busy, .mm-growing").count() == 0


def test_a_conversation_goes_on_about_earlier_media(open_page: Any, tiny_url: str, picture: Path) -> None:
    page = open_page(tiny_url)
    upload(page, picture)
    ask(page, "Which colour?")
    first = [card.locator(".mm-answer").inner_text() for card in page.locator(".mm-card").all()]
    ask(page, "Describe the picture.", click="#mm-follow-up")
    page.wait_for_selector(".mm-turn")
    for card, said in zip(page.locator(".mm-card").all(), first, strict=True):
        assert card.locator(".mm-asked").inner_text() == "Which colour? (a bright picture.png)"
        assert card.locator(".mm-said").inner_text().strip() == said.strip()
        assert card.locator(".mm-answer").inner_text().strip()
        assert card.locator(".mm-pic").count() == 1
    assert "256 of 256 visual tokens" in page.inner_text(FULL)


def test_a_server_that_is_not_there_is_explained(open_page: Any, picture: Path) -> None:
    client = Client("http://127.0.0.1:9")
    config = DemoConfig(url=client.url)
    with serving(mounted(build_page(client, samples=()), config)) as url:
        page = open_page(url)
        assert "No server can be reached at http://127.0.0.1:9" in page.inner_text(".mm-server")
        upload(page, picture)
        ask(page, "What?")
        assert "mm serve" in page.inner_text("#mm-status .mm-error")
        assert page.locator("#mm-samples").count() == 0
    client.close()


def test_nothing_chosen_is_explained(open_page: Any, fake_url: str) -> None:
    page = open_page(fake_url)
    page.click("#mm-ask")
    page.wait_for_selector("#mm-status .mm-error")
    assert "Choose a picture or a clip first" in page.inner_text("#mm-status")


def test_methods_are_grouped_by_stage_and_greyed_where_they_do_not_fit(open_page, fake_url, picture) -> None:
    page = open_page(fake_url)
    groups = page.get_by_role("group", name="Along a clip's time")
    assert groups.get_by_role("checkbox", name="evs").is_enabled()
    upload(page, picture)
    page.wait_for_selector("#mm-methods input[value=evs]:disabled")
    assert "For clips only: cubes, evs" in groups.inner_text()
    between = page.get_by_role("group", name="Between tower and decoder")
    assert between.get_by_role("checkbox", name="pool2").is_disabled()
    assert "pool2 cannot be used with fake, which does not supply: a grid." in between.inner_text()
    uniform = between.get_by_role("checkbox", name="uniform")
    uniform.focus()
    page.keyboard.press("Space")
    assert uniform.is_checked()
    ask(page, "What?")
    assert "uniform" in page.locator(".mm-card h2").all_inner_texts()


def test_options_of_the_chosen_methods_are_offered_and_sent(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    upload(page, picture)
    choose(page, "random")
    page.get_by_text("Options of the methods").click()
    page.wait_for_selector("#mm-options-random")
    assert page.locator("#mm-keep-ratio").is_visible()
    assert not page.locator("#mm-option-mustdrop-window").is_visible()
    page.fill("#mm-option-random-seed input", "5")
    ask(page, "What?")
    assert "random:seed=5" in page.inner_text(FIRST)


def test_code_is_copied_with_one_click(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What?")
    card = page.locator(FIRST)
    card.get_by_text("Copy as curl, Python, JavaScript").click()
    for language, sign in (("curl", "curl -sS"), ("Python", "import OpenAI"), ("JavaScript", "await fetch")):
        card.get_by_role("button", name=f"Copy as {language}").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert sign in copied
        assert "a bright picture.png" in copied
        assert "uniform" in copied


def test_a_narrow_window_needs_no_sideways_scrolling(open_page: Any, fake_url: str, picture: Path) -> None:
    page = open_page(fake_url)
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What is in the picture?")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    first, second = page.locator(FULL).bounding_box(), page.locator(FIRST).bounding_box()
    assert first["y"] + first["height"] <= second["y"]
    assert first["x"] <= 16
    page.wait_for_function("document.querySelector('#mm-status').getBoundingClientRect().y < 60")
    assert 0 <= page.locator(FULL).bounding_box()["y"] < 400


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
    choose(page, "uniform")
    ask(page, "What is it?")
    ratio, text = page.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text
