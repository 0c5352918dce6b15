"""How many visual tokens a request will have: known before its tower runs."""

from __future__ import annotations

import math
from typing import cast

from mm.data.media import Image, Prepared, Video
from mm.data.request import Request
from mm.data.tokens import Encoded, Grid, ItemCount
from mm.encode.loaded import LoadedItem
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import load
from mm.encode.token_budget import check_share, planned_tokens
from mm.errors import InvalidRequest
from mm.plugins.encoder import CountsTokens


def count_tokens(request: Request, parts: EncodeParts) -> tuple[ItemCount, ...]:
    """How many visual tokens each item will have, without running the tower.

    Raises:
        MediaError, PluginError: As `encode`.
        InvalidRequest: The encoder cannot tell beforehand, or the budget is too small for so many items.
    """
    loaded = load(request, parts)
    try:
        found = [_grid_of(item, parts) for item in loaded.items]
    finally:
        loaded.budget.give_back()
    reducer = loaded.reducer.plugin
    planned = [planned_tokens(reducer, grid, item.kind) for (grid, _), item in zip(found, request.media, strict=True)]
    limits = loaded.tokens.limits(planned, parts.policy)
    is_exact = loaded.reducer.capabilities.count == "fixed"
    for (grid, _), limit, left in zip(found, limits, planned, strict=True):
        if limit < left:
            check_share(limit, math.prod(grid), parts.policy)
    return tuple(
        ItemCount(kind=item.kind, grid=grid, crops=crops, num_tokens=limit, is_exact=is_exact)
        for item, (grid, crops), limit in zip(request.media, found, limits, strict=True)
    )


def _grid_of(item: LoadedItem, parts: EncodeParts) -> tuple[Grid, tuple[int, int] | None]:
    """The grid of an item's tokens, and the layout of its crops."""
    content, encoder = item.content, parts.encoder
    if isinstance(content, Encoded):
        return content.tokens.grid, content.tokens.crops
    if not isinstance(encoder, CountsTokens):
        raise InvalidRequest("the encoder of this model cannot tell how many tokens it makes before it made them")
    prepared = encoder.prepare(content) if isinstance(content, Image | Video) else cast(Prepared, content)
    return encoder.grid_of(prepared), getattr(prepared, "layout", None)
