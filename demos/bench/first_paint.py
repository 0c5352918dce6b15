"""How long until the demo page is first painted, and until its sample is answered?

Run  python -m demos.bench.first_paint [--loads 7]

Starts the page as `mm demo` does, with the shipped model in this process, and opens it in a headless Chromium with an
empty cache, once per load. Times are the browser's own: first contentful paint, and the time from navigation until the
answers of the sample stand on the page. Printed are median and worst, at 1280 and 390 px.
"""

from __future__ import annotations

import argparse
import shutil
import statistics

from playwright.sync_api import Browser, sync_playwright

from serve.page.launch import DemoConfig, demo_app, serving

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update")


def load(browser: Browser, url: str, width: int) -> tuple[float, float]:
    """Milliseconds until the first paint and until the answers of a fresh visit."""
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".mm-dim")
    answered_ms = page.evaluate("performance.now()")
    painted_ms = page.evaluate(PAINT)
    context.close()
    return float(painted_ms), float(answered_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=7)
    loads = parser.parse_args().loads
    with demo_app(DemoConfig()) as app, serving(app) as url, sync_playwright() as playwright:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        load(browser, url, 1280)  # what is done once per process
        for width in (1280, 390):
            times = [load(browser, url, width) for _ in range(loads)]
            for name, column in zip(("first paint", "answered"), zip(*times, strict=True), strict=True):
                print(f"{width} px, {name}: median {statistics.median(column):,.0f} ms, worst {max(column):,.0f} ms")
        browser.close()


if __name__ == "__main__":
    main()
