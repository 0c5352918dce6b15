"""Write docs/demo.png: the page with the shipped model's answers about a sample.

    python -m tests.serve.page.screenshot

No test; run it again when the page or the shipped model changed.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from serve.page.launch import DemoConfig, demo_app, serving

TARGET = Path(__file__).parents[3] / "docs" / "demo.png"
ASKS = "question => [...document.querySelectorAll('textarea')].some(area => area.value === question)"
SAMPLES = Path(__file__).parents[3] / "demos" / "samples" / "samples.json"
SAMPLE = 2
"""Which of `demos/samples/samples.json`."""


def main() -> None:
    with demo_app(DemoConfig()) as app, serving(app) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.wait_for_selector("text=2 of 2 answers")  # of the sample that is answered at first view
        page.locator("#mm-samples .thumbnail-item").nth(SAMPLE).click()
        page.wait_for_function(ASKS, arg=json.loads(SAMPLES.read_text())[SAMPLE]["question"])
        page.locator("#mm-methods input[value=fastv]").check()
        page.click("#mm-ask")
        page.wait_for_selector("text=3 of 3 answers")
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        browser.close()
    TARGET.parent.mkdir(exist_ok=True)
    # Coverage and not frequency: a small shape's colour must not be merged away.
    small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
