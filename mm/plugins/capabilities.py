"""What a reducer is able to do and what it needs, derived from its declaration. The only module that reads it.

The parts of a pipeline are reducers themselves. Each function here looks at the parts, so a pipeline needs no rules of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Protocol, cast, get_args

from mm.data.media import Kind
from mm.data.tokens import Positions, PublishedPositions
from mm.errors import IncompatiblePlugin, InvalidOption
from mm.plugins.features import (
    BLOCK_KEYS,
    CLIP_TEXT,
    PATCHES,
    RESOLUTION,
    TEXT_EMBEDDINGS,
    TOWER_FEATURES,
)
from mm.plugins.reducer import (
    BeforeDecoder,
    BeforeTower,
    Count,
    InDecode,
    InPrefill,
    InTower,
    Learned,
    OnPixels,
    PerToken,
    PlansTokens,
    Reducer,
    Stage,
    Streams,
)
from mm.plugins.registry import name_of
from mm.plugins.weights import ReducerWeights

OUTSIDE_DECODER = (Stage.PIXELS, Stage.BEFORE_VIT, Stage.IN_VIT, Stage.TEMPORAL, Stage.PRE_LLM)
"""The stages whose result is what the encoder hands over: encoded features depend on them, and on no later stage."""

BEFORE_DECODER = (Stage.TEMPORAL, Stage.PRE_LLM)

INSIDE_DECODER = (Stage.IN_PREFILL, Stage.IN_DECODE, Stage.PER_TOKEN)

KINDS: frozenset[Kind] = frozenset(get_args(Kind))


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a reducer does and needs, its parts taken together.

    Attributes:
        stages: Where it acts, in the order in which a token meets the stages.
        needs: Names of the auxiliary features that the encoder has to supply.
        kinds: Media that at least one of its parts reduces.
        query_aware: Whether the result depends on the question.
        count: "fixed" when the number of kept tokens is known beforehand, "bounded" when there is an upper bound.
        needs_grid: Whether every cell of the grid has to be present.
        positions: "compact" where the tokens that are left are numbered anew.
        published_positions: What the authors did.
        trained: Whether it has weights of its own.
        least_keep_ratio: Tokens kept / tokens in, at worst; None where it depends on the picture or the question.
    """

    stages: tuple[Stage, ...]
    needs: frozenset[str]
    kinds: frozenset[Kind]
    query_aware: bool
    count: Count
    needs_grid: bool
    positions: Positions
    published_positions: PublishedPositions
    trained: bool
    least_keep_ratio: float | None


def capabilities_of(reducer: Reducer) -> Capabilities:
    """What a reducer does and needs."""
    parts = parts_of(reducer)
    acting = {stage for part in parts for stage in part.acts_at}
    return Capabilities(
        stages=tuple(stage for stage in Stage if stage in acting),
        needs=frozenset[str]().union(*(part.needs for part in parts)),
        kinds=frozenset[Kind]().union(*(getattr(part, "kinds", KINDS) for part in parts)),
        query_aware=any(part.query_aware for part in parts),
        count="fixed" if all(part.count == "fixed" for part in parts) else "bounded",
        needs_grid=any(getattr(part, "needs_grid", False) for part in parts),
        positions="compact" if any(getattr(part, "positions", "kept") == "compact" for part in parts) else "kept",
        published_positions=_published_positions(parts),
        trained=any(is_trained(part) for part in parts),
        least_keep_ratio=_least_keep_ratio(parts),
    )


def _published_positions(parts: tuple[Reducer, ...]) -> PublishedPositions:
    found: list[PublishedPositions] = [getattr(part, "published_positions", "kept") for part in parts]
    return "renumbered" if "renumbered" in found else "compact" if "compact" in found else "kept"


def parts_of(reducer: Reducer) -> tuple[Reducer, ...]:
    """The reducers of a pipeline in order, or the one there is."""
    parts: tuple[Reducer, ...] | None = getattr(reducer, "stages", None)
    return parts or (reducer,)


def names_of(reducer: Reducer) -> tuple[str, ...]:
    """The names of the parts, by which faults name them."""
    return tuple(name_of(part) for part in parts_of(reducer))


def in_tower(reducer: Reducer) -> InTower | None:
    """The part that acts inside the vision tower, if there is one.

    Raises:
        InvalidOption: There are several.
    """
    inside = [part for part in parts_of(reducer) if Stage.IN_VIT in part.acts_at]
    if len(inside) > 1:
        raise InvalidOption("pipeline", "stages", "take one reducer inside the tower, not several")
    return cast(InTower, inside[0]) if inside else None


def resolution(reducer: Reducer) -> float | None:
    """The share of its own tokens that a checkpoint is to make; None where no part asks for fewer."""
    ratios = [cast(OnPixels, part).resolution() for part in parts_of(reducer) if Stage.PIXELS in part.acts_at]
    return math.prod(ratios) if ratios else None


def before_tower(reducer: Reducer) -> BeforeTower | None:
    """The part that removes cells before the vision tower, if there is one.

    Raises:
        InvalidOption: There are several, or another acts inside the tower.
    """
    stages = (Stage.BEFORE_VIT, Stage.IN_VIT)
    found = [part for part in parts_of(reducer) if any(stage in part.acts_at for stage in stages)]
    if len(found) > 1:
        raise InvalidOption("pipeline", "stages", "take one reducer before or inside the tower, not several")
    return cast(BeforeTower, found[0]) if found and Stage.BEFORE_VIT in found[0].acts_at else None


def before_decoder(reducer: Reducer) -> tuple[BeforeDecoder, ...]:
    """The parts that act after the projector and before the decoder, in order."""
    return tuple(cast(BeforeDecoder, part) for part in parts_of(reducer) if acts_before_decoder(part))


def in_prefill(reducer: Reducer) -> tuple[InPrefill, ...]:
    """The parts that drop tokens inside the decoder, in order."""
    return tuple(cast(InPrefill, part) for part in parts_of(reducer) if Stage.IN_PREFILL in part.acts_at)


def in_decode(reducer: Reducer) -> tuple[InDecode, ...]:
    """The parts that evict entries from the KV cache, in order."""
    return tuple(cast(InDecode, part) for part in parts_of(reducer) if Stage.IN_DECODE in part.acts_at)


def streams(reducer: Reducer) -> Streams | None:
    """The part that takes a clip chunk by chunk, if no other part acts before the decoder."""
    outside = [part for part in parts_of(reducer) if acts_outside_decoder(part)]
    return outside[0] if len(outside) == 1 and isinstance(outside[0], Streams) else None


def per_token(reducer: Reducer) -> tuple[PerToken, ...]:
    """The parts that decide about each generated token."""
    return tuple(cast(PerToken, part) for part in parts_of(reducer) if Stage.PER_TOKEN in part.acts_at)


def rewrites(part: Reducer) -> bool:
    """Whether it computes new tokens in place of those that come in."""
    return bool(getattr(part, "rewrites", False))


def is_trained(part: Reducer) -> bool:
    """Whether a reducer, not a pipeline, has weights of its own."""
    return bool(getattr(part, "trained", False))


def decoder_weights(reducer: Reducer) -> ReducerWeights | None:
    """The weights of the part for which the decoder was adapted, if there is one.

    Raises:
        InvalidOption: There are several.
    """
    loaded = [cast(Learned, part).loaded for part in parts_of(reducer) if is_trained(part)]
    found = [weights for weights in loaded if weights is not None and weights.adapts_decoder]
    if len(found) > 1:
        names = " and ".join(weights.reducer for weights in found)
        raise InvalidOption("pipeline", "stages", f"take one reducer with a decoder of its own, not {names}")
    return found[0] if found else None


def plans_tokens(reducer: Reducer) -> tuple[PlansTokens, ...]:
    """The parts that have a `plan`, in order: those that act before the decoder or inside the tower."""
    return tuple(cast(PlansTokens, part) for part in parts_of(reducer) if acts_outside_decoder(part))


def acts_before_decoder(reducer: Reducer) -> bool:
    """Whether it decides about an item's tokens after the projector."""
    return any(stage in BEFORE_DECODER for stage in reducer.acts_at)


def acts_outside_decoder(reducer: Reducer) -> bool:
    """Whether what the encoder hands over depends on the reducer."""
    return any(stage in OUTSIDE_DECODER for stage in reducer.acts_at)


def _least_keep_ratio(parts: tuple[Reducer, ...]) -> float | None:
    least = 1.0
    for part in parts:
        ratio = _keep_ratio(part)
        if ratio is None:
            return None
        least *= ratio
    return least


def _keep_ratio(part: Reducer) -> float | None:
    """Of one reducer: its option of that name, or what it plans of a large picture."""
    ratio: float | None = getattr(part, "keep_ratio", None)
    if ratio is None and part.count == "fixed" and all(stage in OUTSIDE_DECODER for stage in part.acts_at):
        side = 100
        ratio = cast(PlansTokens, part).plan(side**2, (1, side, side)) / side**2
    return ratio


SUPPLIED_AFTER_MERGING = frozenset({BLOCK_KEYS, PATCHES, RESOLUTION, TOWER_FEATURES, TEXT_EMBEDDINGS, CLIP_TEXT})
"""The auxiliary features that an encoder still supplies when tokens are removed before or inside its tower."""


def check_kinds(merging: InTower | None, kinds: Iterable[Kind], merges: Container[str]) -> None:
    """Refuse a reducer inside the tower for kinds of media with which the tower hosts none.

    Args:
        kinds: Of the items of a request.
        merges: The kinds with which it hosts one.

    Raises:
        IncompatiblePlugin: Names the kind.
    """
    if merging is not None and (left := sorted({kind for kind in kinds if kind not in merges})):
        what = {"video": "clips", "image": "images"}[left[0]]
        raise IncompatiblePlugin(name_of(merging), f"{what} of this model", ["a tower that merges their tokens"])


class ProvidesFeatures(Protocol):
    """What the compatibility check reads of an encoder, or of an encoder's class."""

    @property
    def provides(self) -> frozenset[str]: ...


def check_compatible(reducer: Reducer, encoder: ProvidesFeatures, host: str) -> None:
    """Refuse a reducer that needs what the encoder does not supply.

    Args:
        host: Names the encoder in the error.

    Raises:
        IncompatiblePlugin: Names what is missing.
        InvalidOption: Several of its parts act inside the tower.
    """
    needs = frozenset[str]().union(*(part.needs for part in parts_of(reducer)))
    lacks: dict[str, str] = getattr(encoder, "lacks", {})
    missing = [f"{name} ({lacks[name]})" if name in lacks else name for name in sorted(needs - encoder.provides)]
    if missing:
        raise IncompatiblePlugin(name_of(reducer), host, missing)
    dropping = before_tower(reducer)
    hosted, needed = (in_tower(reducer), BLOCK_KEYS) if dropping is None else (dropping, PATCHES)
    if hosted is not None:
        lost = sorted(needs - SUPPLIED_AFTER_MERGING) + ([needed] if needed not in encoder.provides else [])
        if lost:
            where = "in" if dropping is None else "before"
            after = [f"{name} with {name_of(hosted)} {where} its tower" for name in lost]
            raise IncompatiblePlugin(name_of(reducer), host, after)
