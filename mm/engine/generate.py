"""One request's journey: media -> visual tokens -> fewer of them -> prompt -> answer.

`encode` and `answer` are the two halves that may run in different processes; `generate` is both in one. Every way in
(HTTP in process, HTTP on Ray, Python, batch jobs) calls these and nothing else. No Ray and no HTTP here.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor

from mm.core.config import MediaLimits, ReducerPolicy, SourcePolicy, VideoDecoder
from mm.core.data import (
    Encoded,
    EncodeTimings,
    Event,
    FrameSampling,
    Image,
    Media,
    MediaSource,
    Request,
    TextPart,
    Video,
    VisionOptions,
    VisualTokens,
)
from mm.core.errors import MediaError, MmError, ReducerFault, ReducerNotAllowed
from mm.core.plugins import (
    TEXT_EMBEDDINGS,
    Encoder,
    ReadsText,
    Reducer,
    build_reducer,
    canonical_spec,
    check_compatible,
    encode_spec,
    least_keep_ratio,
    parse_spec,
    tower_stage,
)
from mm.core.reduce import reduce_tokens
from mm.engine.engine import Engine
from mm.engine.feature_cache import FeatureCache, cache_key
from mm.engine.report import Feed
from mm.engine.sequence import Job
from mm.media import MediaBudget, content_hash, fetch
from mm.media.loading import decode as decode_media

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodeParts:
    """What the encoder's half needs. `host` names the encoder in messages."""

    encoder: Encoder
    cache: FeatureCache
    host: str
    reducer: str = "none"
    frames: FrameSampling = field(default_factory=FrameSampling)
    limits: MediaLimits = field(default_factory=MediaLimits)
    sources: SourcePolicy = field(default_factory=SourcePolicy)
    video_decoder: VideoDecoder = "pyav"
    policy: ReducerPolicy = field(default_factory=ReducerPolicy)


def resolve_reducer(vision: VisionOptions, parts: EncodeParts) -> Reducer:
    """The reducer a request asks for, or the default one.

    Raises:
        PluginError: It is unknown, has bad options, or cannot work with this encoder.
    """
    reducer = build_reducer(vision.reducer or parts.reducer, vision.keep_ratio)
    if vision.reducer is not None or vision.keep_ratio is not None:
        check_allowed(reducer, parts.policy)
    check_compatible(reducer, parts.encoder, parts.host)
    return reducer


def check_allowed(reducer: Reducer, policy: ReducerPolicy) -> None:
    """Refuse what the operator does not let requests ask for.

    Raises:
        ReducerNotAllowed: Says what is allowed.
    """
    for name, _ in parse_spec(canonical_spec(reducer)):
        if policy.allowed and name not in policy.allowed:
            raise ReducerNotAllowed(
                f"requests to this server may not use the reducer {name!r}; allowed: {', '.join(policy.allowed)}"
            )
    if policy.min_keep_ratio is None:
        return
    least = least_keep_ratio(reducer)
    if least is None or least < policy.min_keep_ratio:
        told = "an unknown share" if least is None else f"{least:g}"
        raise ReducerNotAllowed(
            f"{canonical_spec(reducer)} keeps {told} of the visual tokens at worst; requests to this server may not go "
            f"below {policy.min_keep_ratio:g}"
        )


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
        kept, fault = (tokens, in_tower) if in_tower else _reduce(reducer, tokens, text, parts.policy.lenient)
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
        if not parts.policy.lenient:
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return [tokens.without_evidence() for tokens in parts.encoder.encode(media)], str(error)


def _reduce(reducer: Reducer, tokens: VisualTokens, text: Tensor | None, lenient: bool) -> tuple[VisualTokens, str]:
    """What the reducer leaves, and what it did wrong where that is only noted."""
    try:
        return reduce_tokens(reducer, tokens, text), ""
    except ReducerFault as error:
        if not lenient:
            raise
        log.warning("reducer_fault=%s", error, exc_info=error.__cause__)
        return tokens.without_evidence(), str(error)


def answer(request: Request, encoded: Sequence[Encoded], engine: Engine, *, reducer: str = "none") -> Generator[Event]:
    """Deltas of every choice, then one `Summary`. Closing the generator frees everything at once.

    Args:
        reducer: How the tokens were reduced, and are to be reduced inside the decoder.

    Raises:
        ContextTooLong, InvalidRequest, MediaError: Before the first event.
    """
    feed = Feed()
    job = engine.submit(request, encoded, feed, reducer_of(reducer), reducer)
    yield from engine.events(job, feed)


def generate(request: Request, parts: EncodeParts, engine: Engine) -> Generator[Event]:
    """The whole journey in one process."""
    encoded = encode(request, parts)
    yield from answer(request, encoded, engine, reducer=canonical_spec(resolve_reducer(request.vision, parts)))


def generate_batch(
    requests: Iterable[Request], parts: EncodeParts, engine: Engine, *, ahead: int = 32
) -> Iterator[tuple[int, list[Event] | MmError]]:
    """Many requests: their number in the sequence with all their events or what was wrong, in order of completion.

    Media are encoded in a thread of their own while earlier requests are decoded.

    Args:
        ahead: Requests that are encoded or in the engine at a time; bounds the memory of an endless sequence.
    """
    numbered = enumerate(requests)
    encoding: dict[Future[tuple[list[Encoded], str]], tuple[int, Request]] = {}
    running: dict[int, tuple[Job, Feed, list[Event]]] = {}

    def encode_one(request: Request) -> tuple[list[Encoded], str]:
        return encode(request, parts), canonical_spec(resolve_reducer(request.vision, parts))

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        try:
            while True:
                room = ahead - len(encoding) - len(running)
                for number, request in itertools.islice(numbered, room):
                    encoding[pool.submit(encode_one, request)] = number, request
                if not encoding and not running:
                    return
                if not running:
                    wait(encoding, return_when=FIRST_COMPLETED)
                for done in [future for future in encoding if future.done()]:
                    number, request = encoding.pop(done)
                    try:
                        encoded, spec = done.result()
                        feed = Feed()
                        running[number] = engine.submit(request, encoded, feed, reducer_of(spec), spec), feed, []
                    except MmError as error:
                        yield number, error
                engine.step()
                for number, (_, feed, events) in list(running.items()):
                    if (outcome := _drained(feed, events)) is not None:
                        del running[number]
                        yield number, outcome
        finally:
            for future in encoding:
                future.cancel()
            for job, _, _ in running.values():
                engine.cancel(job)


def _drained(feed: Feed, events: list[Event]) -> list[Event] | MmError | None:
    """Move what is there to `events`; the outcome once it is over."""
    while (item := feed.take()) is not None:
        event, error = item
        if event is not None:
            events.append(event)
        elif error is None:
            return events
        elif isinstance(error, MmError):
            return error
        else:
            raise error
    return None


@functools.lru_cache(maxsize=256)
def reducer_of(spec: str) -> Reducer:
    """The reducer of a specification; immutable, so one object serves all requests."""
    return build_reducer(spec)


__all__ = ["EncodeParts", "answer", "encode", "generate", "generate_batch", "reducer_of", "resolve_reducer"]
