"""Servers and uploads for the demo page's tests; everything that runs here may talk to this machine only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

HERE = frozenset({None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0"})


class Outbound:
    """Records every address outside of this machine that this process looks up or connects to.

    An audit hook sees what the interpreter's own socket calls do, whoever makes them; it cannot be removed again.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, object]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "socket.getaddrinfo":
            host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
            host = args[1][0]
        else:
            return
        if host not in HERE:
            self.seen.append((event, host))


@pytest.fixture(scope="session")
def outbound() -> Outbound:
    return Outbound()


@pytest.fixture
def no_outbound(outbound: Outbound) -> Iterator[None]:
    outbound.seen.clear()
    yield
    assert outbound.seen == []


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright picture whose name needs quoting in a shell."""
    ramp = np.linspace(120, 250, 320)
    pixels = np.stack([np.tile(ramp, (240, 1)), np.full((240, 320), 180.0), np.tile(ramp[::-1], (240, 1))], axis=-1)
    path = tmp_path_factory.mktemp("demo") / "a bright picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing of use")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.serve.page.browsing import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def fake_url() -> Iterator[str]:
    """The page in front of the stand-in."""
    from serve.page.launch import DemoConfig, demo_app, serving
    from tests.serve.page.fake_server import fake_app

    with serving(fake_app()) as server, demo_app(DemoConfig(url=server)) as app, serving(app) as url:
        yield url


@pytest.fixture(scope="session")
def tiny_url() -> Iterator[str]:
    """The page as `mm demo` starts it: the shipped model in this process."""
    from serve.page.launch import DemoConfig, demo_app, serving

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
