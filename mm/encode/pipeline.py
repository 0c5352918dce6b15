"""The encoder's half of a request: fetch, decode, tower, reduce, cache.

`encode` does all of it. It consists of two steps: `load` waits for bytes and for decoders, `encode_loaded` computes.
A runtime may run them in different threads. Neither keeps anything between requests beside the feature cache, and no
item's tokens depend on another item, so the items of a request may be shared out between encoders.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from torch import Tensor

from mm.data.media import FrameSampling, Image, Media, MediaFile, Prepared, Video
from mm.data.request import Request, TextPart
from mm.data.tokens import Cube, Encoded, EncodedMedia, EncodeTimings, VisualTokens
from mm.encode.feature_cache import cache_key
from mm.encode.parts import EncodeParts
from mm.encode.policy import resolve_reducer
from mm.errors import MediaError, ReducerFault
from mm.media import MediaBudget, content_hash, decode, decoded_size, fetch_item
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import in_tower, names_of, parts_of, streams
from mm.plugins.encoder import HostsReducer, PreparesItems, ReadsCompany, ReadsText
from mm.plugins.features import TEXT_EMBEDDINGS
from mm.plugins.reducer import Reducer, Streams
from mm.plugins.registry import name_of
from mm.plugins.spec import ReducerSpec
from mm.plugins.threads import plugin_errors

log = logging.getLogger(__name__)
T = TypeVar("T")

Prepare = Callable[[Image | Video, str | None], Image | Video | Prepared]
"""An item's pixels, and the request field they came from, to what the tower takes."""


@dataclass(frozen=True, kw_only=True)
class LoadedItem:
    """One media item before the tower.

    Attributes:
        key: Its key in the feature cache.
        content: What the tower takes, or its tokens when the feature cache held them. Its file before it is decoded.
        load_s: Seconds to fetch, decode and prepare it.
        num_media_bytes: Size of its encoded file.
    """

    key: str
    content: MediaFile | Image | Video | Prepared | Encoded
    load_s: float = 0.0
    num_media_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class LoadedMedia:
    """The media of one request before the tower, and what is to be done with them.

    Attributes:
        reducer: The request's reducer, checked against policy and encoder.
        budget: What the media drew from. It holds the memory of pixels that could not be prepared.
        text: (T, D) embeddings of the user's last turn if the reducer reads it.
    """

    items: tuple[LoadedItem, ...]
    reducer: ReducerSpec
    budget: MediaBudget
    text: Tensor | None = None


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

    The largest is decoded first, so that a request that needs too much memory is refused before the others are decoded.

    Args:
        budget: What the media draw from. Give it only if some of them drew from it already (`MediaFile`).

    Raises:
        MediaError, PluginError: As `encode`.
    """
    spec, frames = resolve_reducer(request.vision, parts), request.vision.frames or parts.frames
    budget = budget or MediaBudget(parts.limits)
    budget.memory = parts.memory
    asked, text = "", None
    if TEXT_EMBEDDINGS in spec.capabilities.needs:
        asked = question(request)
        text = _embed_text(asked, parts)  # refuses a text that is too long before any work on the media
    in_company = _in_company(request, parts)
    key_of = functools.partial(
        cache_key,
        fingerprint=parts.encoder.fingerprint + (" in company" if in_company else ""),
        reducer_spec=spec.before_decoder,
        tenant=request.cache_salt,
        question=asked,
    )
    prepare = functools.partial(
        _prepared, budget=budget, parts=parts, keep_clips=_takes_frames(spec.plugin), in_company=in_company
    )
    try:
        fetched = [_fetch_item(item, frames, budget, parts, key_of, prepare) for item in request.media]
        items = _decode_files(fetched, frames, budget, prepare)
    except BaseException:
        budget.give_back()
        raise
    return LoadedMedia(items=items, reducer=spec, budget=budget, text=text)


def _in_company(request: Request, parts: EncodeParts) -> bool:
    """Whether pictures are prepared as several of one prompt, which makes a difference to some encoders."""
    reads = isinstance(parts.encoder, ReadsCompany) and parts.encoder.reads_company
    return reads and sum(item.kind == "image" for item in request.media) > 1


def question(request: Request) -> str:
    """The text of the user's last turn, which a query-aware reducer reads."""
    turns = [message for message in request.messages if message.role == "user"]
    return "\n".join(part.text for part in turns[-1].parts if isinstance(part, TextPart)) if turns else ""


def _embed_text(text: str, parts: EncodeParts) -> Tensor:
    return _call_encoder(parts, lambda: cast(ReadsText, parts.encoder).embed_text(text))


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
    items: Sequence[LoadedItem], frames: FrameSampling, budget: MediaBudget, prepare: Prepare
) -> tuple[LoadedItem, ...]:
    """The items with their files decoded, the largest first."""
    done = list(items)
    files = {i: item.content for i, item in enumerate(items) if isinstance(item.content, MediaFile)}
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
    in_company: bool,
) -> Image | Video | Prepared:
    """The item as the tower takes it, if the encoder can prepare single items. Then its pixels are given back.

    Args:
        keep_clips: Leave clips as they are, for a reducer that takes their frames chunk by chunk.
        in_company: See `ReadsCompany`.
    """
    if not isinstance(parts.encoder, PreparesItems) or (keep_clips and isinstance(pixels, Video)):
        return pixels
    try:
        encoder = parts.encoder
        prepared = _call_encoder(parts, lambda: encoder.prepare(pixels, **({"in_company": True} if in_company else {})))
    except MediaError as error:
        raise error.at(param) if param else error from None
    budget.give_back()
    return prepared


def _takes_frames(reducer: Reducer) -> bool:
    """Whether a part of the reducer takes a clip chunk by chunk, or has to know when its frames were shown."""
    return any(isinstance(part, Streams) for part in parts_of(reducer))


def encode_loaded(loaded: LoadedMedia, parts: EncodeParts) -> EncodedMedia:
    """The tokens of every item. Items that are not cached are one batch of the tower; equal ones are encoded once.

    Raises:
        ReducerFault: The reducer failed, and the policy's `on_error` is "fail".
        CapacityError: The device has no memory for one item.
    """
    fresh: dict[str, LoadedItem] = {}
    for item in loaded.items:
        if not isinstance(item.content, Encoded):
            fresh.setdefault(item.key, item)
    try:
        encoded = _encode_batch(fresh, loaded, parts)
    finally:
        loaded.budget.give_back()
    return EncodedMedia(
        items=tuple(
            replace(
                item.content if isinstance(item.content, Encoded) else encoded[item.key],
                num_media_bytes=item.num_media_bytes,
            )
            for item in loaded.items
        ),
        reducer=loaded.reducer.canonical,
    )


def _encode_batch(fresh: dict[str, LoadedItem], loaded: LoadedMedia, parts: EncodeParts) -> dict[str, Encoded]:
    """The tokens of `fresh` by key; what went well is cached."""
    streamed, fresh = _encode_streams(fresh, loaded, parts)
    if not fresh:
        return streamed
    start, reducer = time.perf_counter(), loaded.reducer.plugin
    pixels = [cast(Image | Video, item.content) for item in fresh.values()]  # or what `prepare` made of them
    batch, fault = _run_tower(pixels, reducer, parts)
    encode_s = (time.perf_counter() - start) / len(fresh)
    encoded = streamed
    for item, tokens in zip(fresh.values(), batch, strict=True):
        start = time.perf_counter()
        kept, item_fault = (tokens, fault) if fault else _reduce(reducer, tokens, loaded.text, parts)
        timings = EncodeTimings(load_s=item.load_s, encode_s=encode_s, reduce_s=time.perf_counter() - start)
        key = "" if item_fault else item.key
        cubes = _cubes(kept, item.content)
        encoded[item.key] = Encoded(tokens=kept, timings=timings, key=key, fault=item_fault, cubes=cubes)
        if not item_fault:
            parts.cache.put(item.key, replace(encoded[item.key], timings=EncodeTimings()))
    return encoded


STREAMED_FRAMES = 16
"""Frames of a chunk. The tower's memory is that of so many."""


def _encode_streams(
    fresh: dict[str, LoadedItem], loaded: LoadedMedia, parts: EncodeParts
) -> tuple[dict[str, Encoded], dict[str, LoadedItem]]:
    """The clips whose reducer takes them chunk by chunk, done and cached; and the items that are left."""
    reducer = streams(loaded.reducer.plugin)
    if reducer is None or not getattr(parts.encoder, "frames_apart", False):
        return {}, fresh
    done: dict[str, Encoded] = {}
    for item in fresh.values():
        if isinstance(item.content, Video) and len(item.content.frames):
            start = time.perf_counter()
            try:
                with plugin_errors(name_of(reducer), "on the frames of a clip"):
                    tokens = _encode_stream(item.content, reducer, parts)
            except ReducerFault:
                if parts.policy.on_error == "fail":
                    raise
                continue  # it is encoded whole, and keeps all its tokens if the reducer fails on them too
            timings = EncodeTimings(load_s=item.load_s, encode_s=time.perf_counter() - start)
            cubes = _cubes(tokens, item.content)
            done[item.key] = Encoded(tokens=tokens, timings=timings, key=item.key, cubes=cubes)
            parts.cache.put(item.key, replace(done[item.key], timings=EncodeTimings()))
    return done, {key: item for key, item in fresh.items() if key not in done}


def _encode_stream(clip: Video, reducer: Streams, parts: EncodeParts) -> VisualTokens:
    stream = reducer.stream()
    for start in range(0, len(clip.frames), STREAMED_FRAMES):
        part = slice(start, start + STREAMED_FRAMES)
        chunk = replace(clip, frames=clip.frames[part], timestamps_s=clip.timestamps_s[part])
        (tokens,) = _call_encoder(parts, functools.partial(parts.encoder.encode, [chunk], needs=reducer.needs))
        stream.add(tokens)
    return stream.finish()


def _cubes(tokens: VisualTokens, item: object) -> tuple[Cube, ...]:
    """The pieces into which a reducer cut a clip, with their times."""
    if not tokens.borders or not isinstance(item, Video):
        return ()
    ends = [*tokens.borders[1:], len(item.timestamps_s)]
    times = [*item.timestamps_s, max(item.duration_s, item.timestamps_s[-1])]
    return tuple(
        Cube(first_frame=first, num_frames=end - first, start_s=times[first], end_s=times[end])
        for first, end in zip(tokens.borders, ends, strict=True)
    )


def _run_tower(pixels: Sequence[Image | Video], reducer: Reducer, parts: EncodeParts) -> tuple[list[VisualTokens], str]:
    """The items' tokens, and what a reducer inside the tower did wrong if the policy keeps all tokens then."""
    merging, needs = in_tower(reducer), reducer.needs
    try:
        if merging is None:
            return _call_encoder(parts, lambda: parts.encoder.encode(pixels, needs=needs)), ""
        host = cast(HostsReducer, parts.encoder)
        parts.calls.check("reducer", names_of(merging))
        return _call_encoder(parts, lambda: host.encode(pixels, needs=needs, merging=merging)), ""
    except ReducerFault as error:
        if parts.policy.on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        whole = _call_encoder(parts, lambda: parts.encoder.encode(pixels))
        return [tokens.without_aux_features() for tokens in whole], str(error)


def _call_encoder(parts: EncodeParts, function: Callable[[], T]) -> T:
    name, limit_s = name_of(parts.encoder), parts.calls.limits.encoder_timeout_s
    return parts.calls.call("encoder", (name,), "while it encoded", function, timeout_s=limit_s)


def _reduce(
    reducer: Reducer, tokens: VisualTokens, text: Tensor | None, parts: EncodeParts
) -> tuple[VisualTokens, str]:
    """What the reducer leaves, and its fault if the policy is to keep all. Then all tokens are kept."""
    names, limit_s = names_of(reducer), parts.calls.limits.reducer_timeout_s
    try:
        reduced = parts.calls.call(
            "reducer",
            names,
            "before the decoder",
            lambda: reduce_tokens(reducer, tokens, text),
            timeout_s=limit_s,
        )
        return reduced, ""
    except ReducerFault as error:
        if parts.policy.on_error == "fail":
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return tokens.without_aux_features(), str(error)
