from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.evaluation.client import EvalRequest, Reply
from serve.evaluation.items import Item, with_swaps, write_test_set
from tests.helpers.clips import clip_bytes

COLORS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 60, 220), "white": (250, 250, 250)}


def picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), COLORS[color], np.uint8)).save(file, "PNG")
    return file.getvalue()


def color_of(media: bytes) -> str:
    """What the fake model sees."""
    pixel = np.asarray(Image.open(io.BytesIO(media)).convert("RGB"), float)[0, 0]
    return min(COLORS, key=lambda name: float(np.abs(pixel - COLORS[name]).sum()))


def make_items() -> list[Item]:
    """Four flat pictures with two questions each, and two clips."""
    items = []
    for i, color in enumerate(COLORS):
        shared = {"media": picture(color), "media_type": "image/png", "media_index": i, "num_objects": 1 + i % 2}
        items.append(
            Item(id=f"color-{i}", task="color", question="Which color?", answer=color, wording="trained", **shared)
        )
        ask = {"question": "Is it red?", "answer": "yes" if color == "red" else "no"}
        items.append(Item(id=f"exist-{i}", task="exist", wording="unseen", **ask, **shared))
    for i in range(2):
        media = {"media": clip_bytes(num_frames=4 + i), "media_type": "video/mp4", "media_index": 4 + i}
        items.append(Item(id=f"clip-{i}", task="clip-length", question="How long?", answer="long", **media))
    return with_swaps(items)


class FakeBackend:
    """Sees colors; says that everything is red when asked so; knows one reducer that makes it blind."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, EvalRequest]] = []
        self.closed = False

    def metadata(self) -> dict[str, Any]:
        return {"model": "fake", "through": "a test"}

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        for ask in requests:
            self.asked.append((reducer, ask))
            yield Reply(
                text=self._text(ask, reducer),
                num_visual_tokens_in=8,
                num_visual_tokens_kept=8 if reducer is None else 2,
            )

    def close(self) -> None:
        self.closed = True

    def _text(self, ask: EvalRequest, reducer: str | None) -> str:
        if ask.kind == "video":
            return "short"
        if ask.question.startswith("Is it red?"):
            return "Yes."
        return "grey" if reducer == "blind" else f" {color_of(ask.media).upper()}."


@pytest.fixture
def items() -> list[Item]:
    return make_items()


@pytest.fixture
def file(tmp_path: Path, items: list[Item]) -> Path:
    path = tmp_path / "set.parquet"
    write_test_set(path, items)
    return path
