"""The encoder's half of a request: fetch, decode, tower, reduce, cache."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from mm.config import OnError
from mm.data.media import FrameSampling, Image, Media, MediaSource, Video
from mm.data.request import Request, TextPart
from mm.data.tokens import Encoded, EncodeTimings, VisualTokens
from mm.encode.feature_cache import cache_key
from mm.encode.parts import EncodeParts
from mm.encode.policy import resolve_reducer
from mm.errors import MediaError, ReducerFault
from mm.media import MediaBudget, content_hash, fetch
from mm.media.loading import decode as decode_media
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import tower_stage
from mm.plugins.encoder import ReadsText
from mm.plugins.features import TEXT_EMBEDDINGS
from mm.plugins.reducer import Reducer
from mm.plugins.spec import encode_spec

log = logging.getLogger(__name__)


def encode(request: Request, parts: EncodeParts) -> list[Encoded]:
    """The reduced visual tokens of every media item, in order. Items that are not cached are encoded as one batch.

    Raises:
        MediaError: An item is broken, not allowed or too large; names the request field.
        PluginError: See `resolve_reducer`.
    """
    reducer = resolve_reducer(request.vision, parts)
    budget = MediaBudget(parts.limits)
    frames = request.vision.frames or parts.frames
    asked = question(request) if TEXT_EMBEDDINGS in reducer.needs else ""
    name = functools.partial(
        cache_key,
        fingerprint=parts.encoder.fingerprint,
        reducer_spec=encode_spec(reducer),
        tenant=request.cache_salt,
        question=asked,
    )
    found: dict[str, Encoded] = {}
    loaded: dict[str, tuple[Image | Video, float]] = {}
    keys = []
    for item in request.media:
        key, media, load_s = _load(item, frames, budget, parts, found, name)
        keys.append(key)
        if media is not None:
            loaded.setdefault(key, (media, load_s))
    found |= _encode_batch(loaded, reducer, parts, asked)
    return [found[key] for key in keys]


def question(request: Request) -> str:
    """The text of the user's last turn: what a query-aware reducer is told."""
    turns = [message for message in request.messages if message.role == "user"]
    return "\n".join(part.text for part in turns[-1].parts if isinstance(part, TextPart)) if turns else ""


def _load(
    item: Media,
    frames: FrameSampling,
    budget: MediaBudget,
    parts: EncodeParts,
    found: dict[str, Encoded],
    name: Callable[[str], str],
) -> tuple[str, Image | Video | None, float]:
    """The item's cache key, and its pixels with the seconds they took; a cached item goes to `found` instead."""
    if item.kind not in parts.encoder.kinds:
        raise MediaError("not_supported", item.kind, param=getattr(item, "param", None))
    start = time.perf_counter()
    if isinstance(item, MediaSource):
        data = fetch(item, parts.sources, budget)
        content = content_hash(item.kind, data, frames, parts.video_decoder)
    else:
        data, content = None, item.content_hash
    key = name(content)
    if (cached := parts.cache.get(key)) is not None:
        found[key] = cached
        return key, None, 0.0
    return key, _decoded(item, data, frames, budget, parts), time.perf_counter() - start


def _decoded(item: Media, data: bytes | None, frames: FrameSampling, budget: MediaBudget, parts: EncodeParts) -> Any:
    if data is None:
        return item
    try:
        return decode_media(item.kind, data, budget, frames, parts.video_decoder)
    except MediaError as error:
        raise error.at(item.param) if isinstance(item, MediaSource) and item.param else error from None


def _encode_batch(
    loaded: dict[str, tuple[Image | Video, float]], reducer: Reducer, parts: EncodeParts, asked: str
) -> dict[str, Encoded]:
    if not loaded:
        return {}
    start = time.perf_counter()
    batch, in_tower = _in_tower([media for media, _ in loaded.values()], reducer, parts)
    text = cast(ReadsText, parts.encoder).embed_text(asked) if TEXT_EMBEDDINGS in reducer.needs else None
    encode_s = (time.perf_counter() - start) / len(loaded)
    encoded = {}
    for (key, (_, load_s)), tokens in zip(loaded.items(), batch, strict=True):
        start = time.perf_counter()
        kept, fault = (tokens, in_tower) if in_tower else _reduce(reducer, tokens, text, parts.policy.on_error)
        reduce_s = time.perf_counter() - start
        timings = EncodeTimings(load_s=load_s, encode_s=encode_s, reduce_s=reduce_s)
        encoded[key] = Encoded(tokens=kept, timings=timings, key="" if fault else key, fault=fault)
        if not fault:
            parts.cache.put(key, replace(encoded[key], timings=EncodeTimings()))
    return encoded


def _in_tower(media: Sequence[Image | Video], reducer: Reducer, parts: EncodeParts) -> tuple[list[VisualTokens], str]:
    """The encoded items, and what the reducer inside the tower did wrong where that is only noted."""
    merging = tower_stage(reducer)
    hosted: dict[str, Any] = {} if merging is None else {"merging": merging}
    try:
        return parts.encoder.encode(media, needs=reducer.needs, **hosted), ""
    except ReducerFault as error:
        if parts.policy.on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return [tokens.without_aux_features() for tokens in parts.encoder.encode(media)], str(error)


def _reduce(reducer: Reducer, tokens: VisualTokens, text: Tensor | None, on_error: OnError) -> tuple[VisualTokens, str]:
    """What the reducer leaves, and what it did wrong where that is only noted."""
    try:
        return reduce_tokens(reducer, tokens, text), ""
    except ReducerFault as error:
        if on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return tokens.without_aux_features(), str(error)
