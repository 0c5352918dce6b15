"""How a drafter sees pictures: one file per way, each a small module that makes draft rows out of visual tokens.

A way of seeing decides which rows of the drafter's cache stand for a prompt's visual tokens, and what text rows behind
them are told. It may be as lossy as it likes: the verifier decides about every token.
"""

from __future__ import annotations

import importlib
from typing import Any

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import SeenRows, VisionAdapter, VisualContext
from mm.errors import InvalidOption, nearest

WAYS = {
    "flash": "mm.engine.spec_decode.drafters.eagle.vision_adapters.flash:LatentQueries",
    "msd": "mm.engine.spec_decode.drafters.eagle.vision_adapters.msd:EveryRow",
    "none": "mm.engine.spec_decode.drafters.eagle.vision_adapters.none:Unseen",
    "specvlm": "mm.engine.spec_decode.drafters.eagle.vision_adapters.specvlm:ElasticCompressor",
    "vispec": "mm.engine.spec_decode.drafters.eagle.vision_adapters.vispec:OneRowAndGlobal",
}
"""Name to class. Classes are imported when they are asked for."""


def build_vision_adapter(name: str, width: int, **options: Any) -> VisionAdapter:
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


__all__ = ["WAYS", "SeenRows", "VisionAdapter", "VisualContext", "build_vision_adapter"]
