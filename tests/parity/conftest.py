"""Drafters that only tests have."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from mm.plugins import registry as plugins
from tests.helpers.drafters import TRUTH


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The name "wild" among the drafters, for a while."""
    points = dict(plugins._entry_points("drafter"))
    points["wild"] = importlib.metadata.EntryPoint("wild", "tests.helpers.drafters:Wild", "mm.drafters")
    found = plugins._entry_points
    monkeypatch.setattr(plugins, "_entry_points", lambda kind: points if kind == "drafter" else found(kind))
    yield
    TRUTH.clear()
