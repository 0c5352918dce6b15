"""Clips, and budgets with chosen limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mm.config import MediaLimits
from mm.media import MediaBudget
from tests.helpers.clips import clip_bytes, shade


@pytest.fixture
def make_clip() -> Callable[..., bytes]:
    return clip_bytes


@pytest.fixture
def read_shade() -> Callable[[np.ndarray], int]:
    return shade


@pytest.fixture
def make_budget() -> Callable[..., MediaBudget]:
    return lambda **limits: MediaBudget(MediaLimits(**limits))


@pytest.fixture
def budget() -> MediaBudget:
    return MediaBudget(MediaLimits())


@pytest.fixture(scope="session", autouse=True)
def end_spares() -> Iterator[None]:
    """The spare is ended with the session, not at interpreter exit, where its pipes would be reported as left open."""
    yield
    from mm.media.child_pool import POOL

    POOL.close()
