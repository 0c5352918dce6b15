"""Small checkpoints of every architecture, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mm.models.checkpoint import find
from tests.helpers.checkpoints import CHECKPOINTS

Checkpoint = Callable[[str, int], Path]
"""A `model_type`, or a shipped model's name, and a seed, to a folder."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[tuple[str, int], Path] = {}

    def of(name: str, seed: int = 0) -> Path:
        if name == "tiny":
            return find("tiny")
        if name not in CHECKPOINTS:
            pytest.fail(f"{name!r} is registered: add what writes a small checkpoint to tests.helpers.checkpoints")
        if (name, seed) not in made:
            made[name, seed] = CHECKPOINTS[name](tmp_path_factory.mktemp(name), seed=seed)
        return made[name, seed]

    return of
