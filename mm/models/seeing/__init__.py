"""How a drafter sees pictures: one file per way, each a small module that makes draft rows out of visual tokens.

A way of seeing decides which rows of the drafter's cache stand for a prompt's visual tokens, and what text rows behind
them are told. It may be as lossy as it likes: the verifier decides about every token.
"""

from __future__ import annotations

import importlib
from typing import Any

from mm.core.errors import InvalidOption, nearest
from mm.models.seeing.base import Seeing, SeenRows, Sight

WAYS = {
    "flash": "mm.models.seeing.flash:LatentQueries",
    "msd": "mm.models.seeing.msd:EveryRow",
    "none": "mm.models.seeing.none:Unseen",
    "specvlm": "mm.models.seeing.specvlm:ElasticCompressor",
    "vispec": "mm.models.seeing.vispec:OneRowAndGlobal",
}
"""Name to class. Classes are imported when they are asked for."""


def build_seeing(name: str, width: int, **options: Any) -> Seeing:
    """The untrained way of seeing `name` for a drafter of that width.

    Raises:
        InvalidOption: No such way, or an option it does not have.
    """
    if name not in WAYS:
        raise InvalidOption("drafter", "seeing", f"was {name!r}{nearest(name, list(WAYS))} (ways: {', '.join(WAYS)})")
    module, _, member = WAYS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), member)(width, **options)
    except TypeError as error:
        raise InvalidOption(name, ", ".join(options) or "options", f"cannot be used: {error}") from error


__all__ = ["WAYS", "Seeing", "SeenRows", "Sight", "build_seeing"]
