"""Drafters that only tests have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.distributions import registered
from tests.helpers.drafters import TRUTH


@pytest.fixture
def wild(tmp_path: Path) -> Iterator[None]:
    """The name "wild" among the drafters, for a while."""
    with registered(tmp_path / "wild", "drafter", {"wild": "tests.helpers.drafters:Wild"}):
        yield
    TRUTH.clear()
