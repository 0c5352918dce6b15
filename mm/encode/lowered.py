"""Budgets in tokens by a lower resolution: items are prepared at a size at which they make no more than they may.

Only for encoders that provide `RESOLUTION`. The tower then costs less too. What is still too much after it, such as a
row of cells that does not fit, the budget's reducer cuts (`mm.encode.token_budget`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

from mm.data.media import Image, Prepared, Video
from mm.encode.loaded import LoadedItem, LoadedMedia
from mm.encode.parts import EncodeParts, call_encoder
from mm.encode.token_budget import NATIVE, TokenBudget, check_share, planned_tokens
from mm.errors import InvalidRequest, MediaError
from mm.plugins.encoder import ChangesResolution, CountsTokens


def lowers(tokens: TokenBudget, parts: EncodeParts) -> bool:
    """Whether a request's budget is reached by a lower resolution."""
    return parts.policy.budget_by == NATIVE and tokens.is_limited


def at_lower_resolution(
    loaded: LoadedMedia, parts: EncodeParts, options: Mapping[str, float], params: Sequence[str | None]
) -> LoadedMedia:
    """The request with its items prepared, and how many tokens each may have.

    Args:
        loaded: Its items are pixels. Memory that they drew is given back.
        options: Those of `prepare` that follow from the request's reducer.
        params: The request field of each item, if it has one.

    Raises:
        MediaError, InvalidRequest, ReducerNotAllowed: As `load`, `TokenBudget.limits` and `check_share`.
    """
    whole = [_prepared(item, parts, options, param) for item, param in zip(loaded.items, params, strict=True)]
    grids = [cast(CountsTokens, parts.encoder).grid_of(one) for one in whole]
    planned = [planned_tokens(loaded.reducer.plugin, grid, one.kind) for grid, one in zip(grids, whole, strict=True)]
    limits = loaded.tokens.limits(planned, parts.policy)
    items = list[LoadedItem]()
    for item, param, full, left, limit in zip(loaded.items, params, whole, planned, limits, strict=True):
        one = full
        if limit < left:
            check_share(limit, left, parts.policy)
            share = options.get("resolution", 1.0) * limit / left
            with suppress(InvalidRequest):  # a processor that cannot make so few makes all
                one = _prepared(item, parts, {**options, "resolution": share}, param)
        key = hashlib.sha256(f"{item.key}\n{NATIVE} {limit} of {left}".encode()).hexdigest()
        cached = parts.cache.get(key)
        items.append(replace(item, key=key, content=cached or one, num_before_budget=left if one is not full else 0))
    loaded.budget.give_back()
    return replace(loaded, items=tuple(items), tokens=replace(loaded.tokens, settled=tuple(limits)))


def _prepared(item: LoadedItem, parts: EncodeParts, options: Mapping[str, float], param: str | None) -> Prepared:
    encoder, pixels = cast(ChangesResolution, parts.encoder), cast("Image | Video", item.content)
    try:
        return call_encoder(parts, lambda: encoder.prepare(pixels, **options))
    except MediaError as error:
        raise error.at(param) if param else error from None
