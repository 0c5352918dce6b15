"""How many visual tokens a request will have: known before its tower runs."""

from __future__ import annotations

import math
from dataclasses import replace

from mm.data.media import Image, Kind, MediaFile, Video
from mm.data.request import Request
from mm.data.tokens import Encoded, Grid, ItemCount
from mm.encode.loaded import LoadedItem, LoadedMedia
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import load
from mm.encode.token_budget import check_share, planned_tokens
from mm.errors import InvalidRequest
from mm.media import decode
from mm.plugins.encoder import CountsTokens


def count_tokens(request: Request, parts: EncodeParts) -> tuple[ItemCount, ...]:
    """How many visual tokens each item will have, without running the tower.

    Raises:
        MediaError, PluginError: As `encode`.
        InvalidRequest: The encoder cannot tell beforehand, or the budget is too small for so many items.
    """
    loaded = load(request, parts)
    try:
        found = [_counted(item, loaded, parts) for item in loaded.items]
    finally:
        loaded.budget.give_back()
    reducer = loaded.reducer.plugin
    planned = [planned_tokens(reducer, one.grid, one.kind) for one in found]
    limits = loaded.tokens.limits(planned, parts.policy)
    is_exact = loaded.reducer.capabilities.count == "fixed"
    for one, limit, left in zip(found, limits, planned, strict=True):
        if limit < left:
            check_share(limit, one.num_tokens_in, parts.policy)
    return tuple(replace(one, num_tokens=limit, is_exact=is_exact) for one, limit in zip(found, limits, strict=True))


def _counted(item: LoadedItem, loaded: LoadedMedia, parts: EncodeParts) -> ItemCount:
    """What the tower makes of an item."""
    content, encoder = item.content, parts.encoder
    if isinstance(content, Encoded):
        tokens = content.tokens
        return _item(tokens.kind, tokens.grid, tokens)
    if not isinstance(encoder, CountsTokens):
        raise InvalidRequest("the encoder of this model cannot tell how many tokens it makes before it made them")
    if isinstance(content, MediaFile):  # a clip that the tower would take chunk by chunk
        content = decode(content, loaded.budget, loaded.frames)
    kind = content.kind
    prepared = encoder.prepare(content) if isinstance(content, Image | Video) else content
    return _item(kind, encoder.grid_of(prepared), prepared)


def _item(kind: Kind, grid: Grid, of: object) -> ItemCount:
    """An item of which nothing is dropped.

    Args:
        of: Its tokens, or what `prepare` returned: what of its crops, its text and its layout there is.
    """
    named = {name: value for name in ("crops", "text", "layout") if (value := getattr(of, name, None)) is not None}
    return ItemCount(kind=kind, grid=grid, num_tokens=math.prod(grid), is_exact=True, **named)
