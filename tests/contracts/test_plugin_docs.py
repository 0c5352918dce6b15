"""The examples of docs/plugins, executed as they are printed."""

from __future__ import annotations

import io
import re
import tomllib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mm.plugins.registry import KINDS, describe
from tests.helpers.distributions import on_path, write_distribution

DOCS = Path(__file__).parents[2] / "docs/plugins"
MODULE = re.compile(r"^`(\w+\.py)`\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
USE = re.compile(r"\.\n?[^\n]*:\n\n```python\n(.*?)^```$|:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_works_as_it_is_printed(kind, tmp_path, monkeypatch):
    text = (DOCS / f"{kind}.md").read_text()
    modules = dict(MODULE.findall(text))
    tables = tomllib.loads(TOML.findall(text)[0])["project"]["entry-points"]
    kind_of = {group: each for each, group in KINDS.items()}
    points = {kind_of[group]: lines for group, lines in tables.items()}
    assert kind in points
    write_distribution(tmp_path / "site", "docs-example", points, modules)
    (use,) = [block for found in USE.findall(text) for block in found if block]
    monkeypatch.chdir(tmp_path)
    with on_path(tmp_path / "site"):
        rows = {row["name"]: row for row in describe(kind)}
        assert all(rows[name]["summary"] for name in points[kind])
        exec(compile(use, f"{kind}.md", "exec"), {"picture": picture()})
