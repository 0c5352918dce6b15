"""What plugins need of each other, and what that means for a request."""

from __future__ import annotations

from typing import Any

from mm.data.tokens import Positions
from mm.errors import IncompatiblePlugin, InvalidOption
from mm.plugins.encoder import Encoder
from mm.plugins.features import (
    BLOCK_KEYS,
    TEXT_EMBEDDINGS,
    TOWER_FEATURES,
)
from mm.plugins.reducer import (
    InDecode,
    InPrefill,
    InTower,
    Reducer,
    Stage,
)


def check_compatible(reducer: Reducer, encoder: Encoder, host: str) -> None:
    """Refuse a reducer that needs what the encoder does not supply.

    Raises:
        IncompatiblePlugin: Names what is missing.
    """
    missing = sorted(reducer.needs - encoder.provides)
    if missing:
        raise IncompatiblePlugin(type(reducer).__name__, host, missing)
    if (merging := tower_stage(reducer)) is not None:
        lost = sorted(reducer.needs - BEHIND_MERGING) + ([BLOCK_KEYS] if BLOCK_KEYS not in encoder.provides else [])
        if lost:
            behind = [f"{name} with {type(merging).__name__} in its tower" for name in lost]
            raise IncompatiblePlugin(type(reducer).__name__, host, behind)


BEHIND_MERGING = frozenset({BLOCK_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS})
"""What an encoder supplies, of what it provides, when tokens were merged inside its tower."""


def tower_stage(reducer: Reducer) -> InTower | None:
    """The reducer that acts inside the tower, if there is one.

    Raises:
        InvalidOption: There are several.
    """
    inside: list[Any] = [stage for stage in flat_stages(reducer) if stage.stage is Stage.IN_VIT]
    if len(inside) > 1:
        raise InvalidOption("pipeline", "stages", "take one reducer inside the tower, not several")
    return inside[0] if inside else None


def flat_stages(reducer: Reducer) -> tuple[Reducer, ...]:
    """The reducers of a pipeline, or the one there is."""
    return tuple(getattr(reducer, "stages", None) or (reducer,))


def inner_stages(reducer: Reducer) -> tuple[tuple[InPrefill, ...], tuple[InDecode, ...]]:
    """The reducers that act inside the decoder: in prefill, and on the cache. One may be both."""
    stages: tuple[Any, ...] = flat_stages(reducer)
    return (
        tuple(stage for stage in stages if hasattr(stage, "in_prefill")),
        tuple(stage for stage in stages if hasattr(stage, "prefill_done")),
    )


def positions_of(reducer: Reducer) -> Positions:
    """What the reducer wants of the positions behind what it drops: "compact" where one of its stages says so."""
    asked = (getattr(stage, "positions", "kept") for stage in flat_stages(reducer))
    return "compact" if "compact" in asked else "kept"


def least_keep_ratio(reducer: Reducer) -> float | None:
    """Tokens kept / tokens in, at worst; None where it depends on the picture or the question."""
    least, side = 1.0, 100
    for stage in flat_stages(reducer):
        ratio = getattr(stage, "keep_ratio", None)
        if ratio is None and stage.count == "fixed":
            ratio = stage.plan(side**2, (1, side, side)) / side**2
        if ratio is None:
            return None
        least *= ratio
    return least
