"""Vision adapters of trained drafters: small modules that turn a prompt's visual tokens into inputs of the draft layer.

An adapter decides which positions of the drafter's cache stand for the visual tokens, and what it adds to the text
after them. It may lose as much as it likes, since the target verifies every drafted token.
"""

from __future__ import annotations

import importlib

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import AdapterOutput, VisionAdapter, VisualContext
from mm.errors import InvalidOption, nearest

VISION_ADAPTERS = {
    "flash": "mm.engine.spec_decode.drafters.eagle.vision_adapters.flash:LatentQueries",
    "msd": "mm.engine.spec_decode.drafters.eagle.vision_adapters.msd:AllVisualTokens",
    "none": "mm.engine.spec_decode.drafters.eagle.vision_adapters.none:NoVisualTokens",
    "specvlm": "mm.engine.spec_decode.drafters.eagle.vision_adapters.specvlm:ElasticCompressor",
    "vispec": "mm.engine.spec_decode.drafters.eagle.vision_adapters.vispec:GlobalFeatureAdapter",
}
"""Name to class. A class is imported when it is first used."""


def build_vision_adapter(name: str, width: int, **options: object) -> VisionAdapter:
    """The untrained adapter `name` for a drafter of that width.

    Raises:
        InvalidOption: There is no such adapter, or it does not have one of the options.
    """
    if name not in VISION_ADAPTERS:
        known = ", ".join(VISION_ADAPTERS)
        hint = nearest(name, list(VISION_ADAPTERS))
        raise InvalidOption("drafter", "vision adapter", f"was {name!r}{hint} (adapters: {known})")
    module, _, member = VISION_ADAPTERS[name].partition(":")
    adapter: type[VisionAdapter] = getattr(importlib.import_module(module), member)
    try:
        return adapter(width, **options)
    except TypeError as error:
        raise InvalidOption(name, ", ".join(options) or "options", f"cannot be used: {error}") from error


__all__ = ["VISION_ADAPTERS", "AdapterOutput", "VisionAdapter", "VisualContext", "build_vision_adapter"]
