"""The encoder's half of a request: fetch, decode, tower, reduce, cache.

`encode` does all of it. It consists of two steps: `load` waits for bytes and for decoders, `encode_loaded` computes.
A runtime may run them in different threads. Neither keeps anything between requests beside the feature cache, and no
item's tokens depend on another item, so the items of a request may be shared out between encoders.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from mm.data.media import FrameSampling, Image, Media, MediaFile, Prepared, Video
from mm.data.request import Request, TextPart
from mm.data.tokens import Encoded, EncodedMedia, EncodeTimings, VisualTokens
from mm.encode.clip_stream import OnProgress, cubes_of, encode_streams, takes_files
from mm.encode.feature_cache import cache_key
from mm.encode.loaded import LoadedItem, LoadedMedia
from mm.encode.lowered import at_lower_resolution, lowers
from mm.encode.parts import EncodeParts, call_encoder
from mm.encode.policy import resolve_reducer
from mm.encode.token_budget import NATIVE, TokenBudget, fitted
from mm.errors import MediaError, ReducerFault
from mm.media import MediaBudget, content_hash, decode, decoded_size, fetch_item
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import before_tower, check_kinds, in_tower, names_of, parts_of, resolution
from mm.plugins.encoder import (
    ChangesResolution,
    HostsReducer,
    PreparesItems,
    ReadsClipText,
    ReadsCompany,
    ReadsText,
    SparesCells,
)
from mm.plugins.features import CLIP_TEXT, TEXT_EMBEDDINGS
from mm.plugins.reducer import Reducer, Streams
from mm.plugins.spec import ReducerSpec

log = logging.getLogger(__name__)

Prepare = Callable[[Image | Video, str | None], Image | Video | Prepared]
"""An item's pixels, and the request field they came from, to what the tower takes."""


def encode(request: Request, parts: EncodeParts, budget: MediaBudget | None = None) -> EncodedMedia:
    """The reduced visual tokens of every media item, in order.

    Args:
        budget: See `load`.

    Raises:
        MediaError: An item is broken, not allowed or too large; names the request field.
        PluginError: See `resolve_reducer`.
    """
    return encode_loaded(load(request, parts, budget), parts)


def load(request: Request, parts: EncodeParts, budget: MediaBudget | None = None) -> LoadedMedia:
    """Fetch the request's media, and decode and prepare those whose tokens are not in the feature cache.

    Clips that are taken chunk by chunk stay files. The largest is decoded first, so that a request that needs too much
    memory is refused before the others are decoded.

    Args:
        budget: What the media draw from. Give it only if some of them drew from it already (`MediaFile`).

    Raises:
        MediaError, PluginError: As `encode`.
    """
    spec, frames = resolve_reducer(request.vision, parts), request.vision.frames or parts.frames
    merges = getattr(parts.encoder, "merges", parts.encoder.kinds)
    check_kinds(in_tower(spec.plugin), (item.kind for item in request.media), merges)
    budget = budget or MediaBudget(parts.limits)
    budget.memory = parts.memory
    asked = question(request) if spec.capabilities.needs & {TEXT_EMBEDDINGS, CLIP_TEXT} else ""
    text, clip_text = _embed_text(asked, spec, parts)  # refuses a text that is too long before any work on the media
    in_company, tokens = _in_company(request, parts), TokenBudget.of(request)
    is_lowered = lowers(tokens, parts)
    key_of = functools.partial(
        cache_key,
        fingerprint=parts.encoder.fingerprint + (" in company" if in_company else ""),
        reducer_spec=spec.before_decoder + (" at a resolution" if is_lowered else ""),
        tenant=request.cache_salt,
        question=asked,
    )
    options = {"resolution": share} if (share := resolution(spec.plugin)) else {}
    options |= {"in_company": True} if in_company else {}
    keep_clips = _takes_frames(spec.plugin)
    prepare: Prepare = functools.partial(_prepared, budget=budget, parts=parts, keep_clips=keep_clips, options=options)
    prepare = _as_it_is if is_lowered else prepare
    try:
        fetched = [_fetch_item(item, frames, budget, parts, key_of, prepare) for item in request.media]
        items = _decode_files(fetched, frames, budget, prepare, keep_clips=takes_files(spec.plugin, parts))
        loaded = LoadedMedia(items=items, reducer=spec, budget=budget, frames=frames, tokens=tokens)
        loaded = replace(loaded, text=text, clip_text=clip_text)
        if is_lowered:
            params = [getattr(item, "param", None) for item in request.media]
            loaded = at_lower_resolution(loaded, parts, options, params)
    except BaseException:
        budget.give_back()
        raise
    return loaded


def _as_it_is(pixels: Image | Video, _: str | None) -> Image | Video:
    """In place of `_prepared`, for items whose size is not settled yet."""
    return pixels


def _in_company(request: Request, parts: EncodeParts) -> bool:
    """Whether pictures are prepared as several of one prompt, which makes a difference to some encoders."""
    reads = isinstance(parts.encoder, ReadsCompany) and parts.encoder.reads_company
    here = sum(item.kind == "image" for item in request.media)
    return reads and (here if request.num_images is None else request.num_images) > 1


def question(request: Request) -> str:
    """The text of the user's last turn, which a query-aware reducer reads."""
    turns = [message for message in request.messages if message.role == "user"]
    return "\n".join(part.text for part in turns[-1].parts if isinstance(part, TextPart)) if turns else ""


def _embed_text(text: str, spec: ReducerSpec, parts: EncodeParts) -> tuple[Tensor | None, Tensor | None]:
    """As the decoder and as CLIP's text tower embed it, where the reducer reads that."""
    needs, decoder, clip = spec.capabilities.needs, None, None
    if TEXT_EMBEDDINGS in needs:
        decoder = call_encoder(parts, lambda: cast(ReadsText, parts.encoder).embed_text(text))
    if CLIP_TEXT in needs:
        clip = call_encoder(parts, lambda: cast(ReadsClipText, parts.encoder).embed_clip_text(text))
    return decoder, clip


def _fetch_item(
    item: Media,
    frames: FrameSampling,
    budget: MediaBudget,
    parts: EncodeParts,
    key_of: Callable[[str], str],
    prepare: Prepare,
) -> LoadedItem:
    param = getattr(item, "param", None)
    if item.kind not in parts.encoder.kinds:
        raise MediaError("not_supported", item.kind, param=param)
    start = time.perf_counter()
    fetched = fetch_item(item, parts.sources, budget)
    if isinstance(fetched, MediaFile):
        key, num_bytes = key_of(content_hash(item.kind, fetched.data, frames)), len(fetched.data)
    else:
        key, num_bytes = key_of(fetched.content_hash), 0
    if (cached := parts.cache.get(key)) is not None:
        return LoadedItem(key=key, content=cached, num_media_bytes=num_bytes)
    content = fetched if isinstance(fetched, MediaFile) else prepare(fetched, param)
    return LoadedItem(key=key, content=content, load_s=time.perf_counter() - start, num_media_bytes=num_bytes)


def _decode_files(
    items: Sequence[LoadedItem], frames: FrameSampling, budget: MediaBudget, prepare: Prepare, *, keep_clips: bool
) -> tuple[LoadedItem, ...]:
    """The items with their files decoded, the largest first.

    Args:
        keep_clips: Leave clips as files.
    """
    done = list(items)
    files = {i: item.content for i, item in enumerate(items) if isinstance(item.content, MediaFile)}
    if keep_clips:
        files = {i: file for i, file in files.items() if file.kind != "video"}
    for i in sorted(files, key=lambda i: decoded_size(files[i]), reverse=True):
        start, file = time.perf_counter(), files[i]
        content = prepare(decode(file, budget, frames), file.param)
        done[i] = replace(items[i], content=content, load_s=items[i].load_s + time.perf_counter() - start)
    return tuple(done)


def _prepared(
    pixels: Image | Video,
    param: str | None,
    *,
    budget: MediaBudget,
    parts: EncodeParts,
    keep_clips: bool,
    options: Mapping[str, float],
) -> Image | Video | Prepared:
    """The item as the tower takes it, if the encoder can prepare single items. Then its pixels are given back.

    Args:
        keep_clips: Leave clips as they are, for a reducer that takes their frames chunk by chunk.
        options: See `ChangesResolution` and `ReadsCompany`.
    """
    if not isinstance(parts.encoder, PreparesItems):
        return pixels
    if keep_clips and isinstance(pixels, Video) and "resolution" not in options:
        return pixels
    try:
        encoder = cast(ChangesResolution, parts.encoder)
        prepared = call_encoder(parts, lambda: encoder.prepare(pixels, **options))
    except MediaError as error:
        raise error.at(param) if param else error from None
    budget.give_back()
    return prepared


def _takes_frames(reducer: Reducer) -> bool:
    """Whether a part of the reducer takes a clip chunk by chunk, or has to know when its frames were shown."""
    return any(isinstance(part, Streams) for part in parts_of(reducer))


def encode_loaded(loaded: LoadedMedia, parts: EncodeParts, on_progress: OnProgress | None = None) -> EncodedMedia:
    """The tokens of every item. Items that are not cached are one batch of the tower; equal ones are encoded once.

    Args:
        on_progress: Told how far a clip is that is taken chunk by chunk.

    Raises:
        MediaError: A clip that was not decoded yet cannot be used; names the request field.
        ReducerFault: The reducer failed, and the policy's `on_error` is "fail".
        CapacityError: The device has no memory for one item.
    """
    fresh: dict[str, LoadedItem] = {}
    for item in loaded.items:
        if not isinstance(item.content, Encoded):
            fresh.setdefault(item.key, item)
    try:
        encoded = _encode_batch(fresh, loaded, parts, on_progress)
    finally:
        loaded.budget.give_back()
    items = [
        replace(
            item.content if isinstance(item.content, Encoded) else encoded[item.key],
            num_media_bytes=item.num_media_bytes,
            num_before_budget=item.num_before_budget,
            budget_by=NATIVE if item.num_before_budget else "",
        )
        for item in loaded.items
    ]
    left = fitted(items, loaded.tokens, parts.policy, loaded.reducer.plugin)
    return EncodedMedia(items=left, reducer=loaded.reducer.canonical)


def _encode_batch(
    fresh: dict[str, LoadedItem], loaded: LoadedMedia, parts: EncodeParts, on_progress: OnProgress | None
) -> dict[str, Encoded]:
    """The tokens of `fresh` by key; what went well is cached."""
    streamed = encode_streams(fresh.values(), loaded, parts, on_progress)
    fresh = {key: _decoded(item, loaded) for key, item in fresh.items() if key not in streamed}
    if not fresh:
        return streamed
    start, reducer = time.perf_counter(), loaded.reducer.plugin
    pixels = [cast(Image | Video, item.content) for item in fresh.values()]  # or what `prepare` made of them
    batch, fault = _run_tower(pixels, reducer, parts)
    encode_s = (time.perf_counter() - start) / len(fresh)
    encoded = streamed
    for item, tokens in zip(fresh.values(), batch, strict=True):
        start = time.perf_counter()
        kept, item_fault = (tokens, fault) if fault else _reduce(reducer, tokens, loaded, parts)
        timings = EncodeTimings(load_s=item.load_s, encode_s=encode_s, reduce_s=time.perf_counter() - start)
        key = "" if item_fault else item.key
        cubes = cubes_of(kept, item.content) if isinstance(item.content, Video) else ()
        encoded[item.key] = Encoded(tokens=kept, timings=timings, key=key, fault=item_fault, cubes=cubes)
        if not item_fault:
            parts.cache.put(item.key, replace(encoded[item.key], timings=EncodeTimings()))
    return encoded


def _decoded(item: LoadedItem, loaded: LoadedMedia) -> LoadedItem:
    """The item; a clip that was to be taken chunk by chunk, and could not, is decoded whole."""
    if not isinstance(item.content, MediaFile):
        return item
    return replace(item, content=decode(item.content, loaded.budget, loaded.frames))


def _run_tower(pixels: Sequence[Image | Video], reducer: Reducer, parts: EncodeParts) -> tuple[list[VisualTokens], str]:
    """The items' tokens, and what a reducer inside the tower did wrong if the policy keeps all tokens then."""
    merging, dropping, needs = in_tower(reducer), before_tower(reducer), reducer.needs
    try:
        if dropping is not None:
            sparing = cast(SparesCells, parts.encoder)
            parts.calls.check("reducer", names_of(dropping))
            return call_encoder(parts, lambda: sparing.encode(pixels, needs=needs, dropping=dropping)), ""
        if merging is None:
            return call_encoder(parts, lambda: parts.encoder.encode(pixels, needs=needs)), ""
        host = cast(HostsReducer, parts.encoder)
        parts.calls.check("reducer", names_of(merging))
        return call_encoder(parts, lambda: host.encode(pixels, needs=needs, merging=merging)), ""
    except ReducerFault as error:
        if parts.policy.on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        whole = call_encoder(parts, lambda: parts.encoder.encode(pixels))
        return [tokens.without_aux_features() for tokens in whole], str(error)


def _reduce(
    reducer: Reducer, tokens: VisualTokens, loaded: LoadedMedia, parts: EncodeParts
) -> tuple[VisualTokens, str]:
    """What the reducer leaves, and its fault if the policy is to keep all. Then all tokens are kept."""
    names, limit_s = names_of(reducer), parts.calls.limits.reducer_timeout_s
    try:
        reduced = parts.calls.call(
            "reducer",
            names,
            "before the decoder",
            lambda: reduce_tokens(reducer, tokens, loaded.text, loaded.clip_text),
            timeout_s=limit_s,
        )
        return reduced, ""
    except ReducerFault as error:
        if parts.policy.on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return tokens.without_aux_features(), str(error)
