"""Servers and uploads for the demo page's tests; everything that runs here may talk to this machine only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

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
