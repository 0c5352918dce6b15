"""One request's journey: media -> visual tokens -> fewer of them -> prompt -> answer.

`encode` and `answer` are the two halves that may run in different processes; `generate` is both in one. Every way in
(HTTP in process, HTTP on Ray, Python, batch jobs) calls these and nothing else. No Ray and no HTTP here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm.core.config import MediaLimits, SourcePolicy, VideoDecoder
from mm.core.data import (
    Delta,
    Encoded,
    EncodeTimings,
    Event,
    FrameSampling,
    Image,
    KeptMap,
    Media,
    MediaSource,
    Prompt,
    Request,
    Sampling,
    Summary,
    Timings,
    Usage,
    Video,
    VisionOptions,
)
from mm.core.errors import ContextTooLong, MediaError
from mm.core.plugins import Encoder, Reducer, build_reducer, canonical_spec, check_compatible
from mm.core.reduce import reduce_tokens
from mm.engine.decode import Progress, decode
from mm.engine.feature_cache import FeatureCache, cache_key
from mm.engine.output import Output
from mm.engine.samplers import SamplerFactory
from mm.media import MediaBudget, content_hash, fetch
from mm.media.loading import decode as decode_media


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


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What the decoder's half needs: a model family, and the lock that lets one request at a time use it."""

    family: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    samplers: SamplerFactory = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samplers", SamplerFactory(self.family))


def resolve_reducer(vision: VisionOptions, parts: EncodeParts) -> Reducer:
    """The reducer a request asks for, or the default one.

    Raises:
        PluginError: It is unknown, has bad options, or cannot work with this encoder.
    """
    reducer = build_reducer(vision.reducer or parts.reducer, vision.keep_ratio)
    check_compatible(reducer, parts.encoder, parts.host)
    return reducer


def encode(request: Request, parts: EncodeParts) -> list[Encoded]:
    """The reduced visual tokens of every media item, in order. Items that are not cached are encoded as one batch.

    Raises:
        MediaError: An item is broken, not allowed or too large; names the request field.
        PluginError: See `resolve_reducer`.
    """
    reducer = resolve_reducer(request.vision, parts)
    budget = MediaBudget(parts.limits)
    frames = request.vision.frames or parts.frames
    found: dict[str, Encoded] = {}
    loaded: dict[str, tuple[Image | Video, float]] = {}
    keys = []
    for item in request.media:
        key, media, load_s = _load(item, frames, reducer, budget, parts, found)
        keys.append(key)
        if media is not None:
            loaded.setdefault(key, (media, load_s))
    found |= _encode_batch(loaded, reducer, parts)
    return [found[key] for key in keys]


def _load(
    item: Media,
    frames: FrameSampling,
    reducer: Reducer,
    budget: MediaBudget,
    parts: EncodeParts,
    found: dict[str, Encoded],
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
    key = cache_key(content, parts.encoder.fingerprint, canonical_spec(reducer))
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
    loaded: dict[str, tuple[Image | Video, float]], reducer: Reducer, parts: EncodeParts
) -> dict[str, Encoded]:
    if not loaded:
        return {}
    start = time.perf_counter()
    batch = parts.encoder.encode([media for media, _ in loaded.values()], needs=reducer.needs)
    encode_s = (time.perf_counter() - start) / len(loaded)
    encoded = {}
    for (key, (_, load_s)), tokens in zip(loaded.items(), batch, strict=True):
        start = time.perf_counter()
        kept = reduce_tokens(reducer, tokens)
        reduce_s = time.perf_counter() - start
        encoded[key] = Encoded(tokens=kept, timings=EncodeTimings(load_s=load_s, encode_s=encode_s, reduce_s=reduce_s))
        parts.cache.put(key, replace(encoded[key], timings=EncodeTimings()))
    return encoded


def answer(request: Request, encoded: Sequence[Encoded], decoder: Decoder, *, reducer: str = "none") -> Iterator[Event]:
    """Deltas of every choice, then one `Summary`. Closing the generator frees everything at once.

    Args:
        reducer: How the tokens were reduced, for the summary.

    Raises:
        ContextTooLong, InvalidRequest, MediaError: Before the first event.
    """
    queued = time.perf_counter()
    with decoder.lock:
        queue_s = time.perf_counter() - queued
        family, sampling = decoder.family, request.sampling
        prompt = family.splice(request.messages, [item.tokens for item in encoded])
        max_new_tokens = _max_new_tokens(sampling, prompt, family)
        samplers = decoder.samplers.make(sampling, prompt)
        outputs = [Output(decoder.samplers.vocabulary, sampler, sampling, max_new_tokens) for sampler in samplers]
        cache = family.language.new_cache(prompt.length + max_new_tokens)
        progress = Progress()
        yield from decode(family.language, prompt, cache, samplers, outputs, progress)
        yield _summary(request, encoded, prompt, progress, queue_s, reducer)


def generate(request: Request, parts: EncodeParts, decoder: Decoder) -> Iterator[Event]:
    """The whole journey in one process."""
    encoded = encode(request, parts)
    yield from answer(request, encoded, decoder, reducer=canonical_spec(resolve_reducer(request.vision, parts)))


def _max_new_tokens(sampling: Sampling, prompt: Prompt, family: Any) -> int:
    room = family.max_context_tokens - prompt.next_position
    if room < max(1, sampling.max_new_tokens or 0):
        raise ContextTooLong(prompt.next_position, sampling.max_new_tokens or 1, family.max_context_tokens)
    return sampling.max_new_tokens or room


def _summary(
    request: Request, encoded: Sequence[Encoded], prompt: Prompt, progress: Progress, queue_s: float, reducer: str
) -> Summary:
    def count(kind: str, what: str) -> int:
        return sum(getattr(item.tokens, what) for item in encoded if item.tokens.kind == kind)

    usage = Usage(
        num_prompt_tokens=prompt.length,
        num_completion_tokens=progress.num_completion_tokens,
        num_image_tokens_in=count("image", "num_tokens_in"),
        num_image_tokens_kept=count("image", "num_tokens"),
        num_video_tokens_in=count("video", "num_tokens_in"),
        num_video_tokens_kept=count("video", "num_tokens"),
    )
    timings = Timings(
        load_s=sum(item.timings.load_s for item in encoded),
        encode_s=sum(item.timings.encode_s for item in encoded),
        reduce_s=sum(item.timings.reduce_s for item in encoded),
        queue_s=queue_s,
        prefill_s=progress.prefill_s,
        decode_s=progress.decode_s,
    )
    kept = tuple(
        KeptMap(kind=item.tokens.kind, grid=item.tokens.grid, kept=tuple(item.tokens.indices.tolist()))
        for item in encoded
    )
    return Summary(usage=usage, timings=timings, kept=kept if request.vision.return_map else (), reducer=reducer)


__all__ = ["Decoder", "Delta", "EncodeParts", "answer", "encode", "generate", "resolve_reducer"]
