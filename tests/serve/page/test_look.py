"""How the page looks and reads, in both themes and on a narrow screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest

from serve.page.samples import load_samples
from tests.serve.page.browsing import (
    FIRST,
    FULL,
    MARKS,
    answered,
    ask,
    choose,
    needs_samples,
    upload,
)

pytestmark = MARKS


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

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"


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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_four_and_a_half(open_page, fake_url, picture, theme):
    page = open_page(f"{fake_url}?__theme={theme}")
    upload(page, picture)
    choose(page, "uniform")
    ask(page, "What is it?")
    ratio, text = page.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text


@needs_samples
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(open_page: Any, fake_url: str, theme: str, width: int) -> None:
    page = open_page(f"{fake_url}?__theme={theme}")
    page.set_viewport_size({"width": width, "height": 844})
    page.locator("#mm-samples .thumbnail-item").nth(len(load_samples()) - 1).click()
    page.wait_for_selector("#mm-shown figure >> nth=7")
    choose(page, "uniform", "random")
    page.fill("#mm-written textarea", "nonesuch")
    page.get_by_text("Options of the methods").click()
    page.get_by_text("Drafting and sampling").click()
    answered(page)
    page.locator(FIRST).get_by_text("Copy as curl").click()
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    faults = [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []
