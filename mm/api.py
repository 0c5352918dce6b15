"""The Python interface.

import mm

model = mm.load("tiny", reducer="divprune:keep_ratio=0.25")
answer = model.generate("What colour is the circle?", images=["scene.png"])
print(answer.text, answer.usage.num_visual_tokens_kept)
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch

from mm.batch import generate_batch
from mm.build import build_decoder, build_encode_parts
from mm.config import ModelConfig, SourcePolicy, model_config
from mm.data.media import FrameSampling, Image, Kind, Media, MediaSource, Video
from mm.data.messages import parse_messages
from mm.data.outputs import Event, KeptMap, Summary, Timings, TokenLogprob, Usage
from mm.data.request import MediaPart, Message, Request, SpeculationOptions, TextPart, VisionOptions
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import EncodedMedia
from mm.encode.pipeline import encode
from mm.engine.engine import LLMEngine
from mm.engine.loop import EngineLoop
from mm.errors import InvalidOption, InvalidRequest, MmError

MediaInput = str | Path | bytes | PIL.Image.Image | np.ndarray | Image | Video


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `Model.generate` returns.

    Attributes:
        texts: One per choice; `text` is the first.
        finish_reasons: One per choice: "stop" or "length".
        token_ids: Per choice, the tokens of the text.
        usage: Token counts.
        timings: Seconds per stage.
        kept: Per media item, which visual tokens were kept.
        reducer: Canonical text of the reducer.
        reducer_faults: What reducers did wrong. Their items were kept whole.
        logprobs: Per choice, one per token; empty when they were not asked for.
        kv_bytes: Size of the first choice's KV cache when its first token came.
    """

    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    usage: Usage
    timings: Timings
    kept: tuple[KeptMap, ...]
    reducer: str
    reducer_faults: tuple[str, ...] = ()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    kv_bytes: int = 0

    @property
    def text(self) -> str:
        return self.texts[0]


class Model:
    """A loaded model: encoder and decoder in this process. Requests of several threads are computed in one batch.

    It can be used as a context manager, which closes it.

    Attributes:
        config: How it was loaded.
        encode_parts: The encoder's half.
        engine: The decoder's half.
        loop: Runs the engine.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.encode_parts = build_encode_parts(config)
        self.engine = build_decoder(config)
        self.loop = EngineLoop(self.engine, num_threads=config.num_threads)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, object]],
        *,
        images: Sequence[MediaInput] = (),
        videos: Sequence[MediaInput] = (),
        **options: object,
    ) -> Answer:
        """Answer a question about images and clips.

        Args:
            prompt: A question, or OpenAI-style messages that may hold `image_url` and `video_url` parts themselves.
            images, videos: Media before the text, images first. Paths, encoded bytes, data URLs; images also as PIL
                images or uint8 arrays (H, W, 3).
            **options: Fields of `SamplingParams` (max_new_tokens, temperature, top_p, top_k, seed, stop, n, logprobs,
                response_format and more), of `VisionOptions` (reducer, keep_ratio, positions, max_visual_tokens,
                num_frames, fps) and of `Request` (priority, timeout_s, cache_salt, and speculation: a drafter's name or
                `SpeculationOptions`). Without a temperature the model's own default holds.

        Raises:
            MmError: Names what was given, what is allowed and what to do.
        """
        return collect(self.stream(prompt, images=images, videos=videos, **options))

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, object]],
        *,
        images: Sequence[MediaInput] = (),
        videos: Sequence[MediaInput] = (),
        **options: object,
    ) -> Generator[Event]:
        """The events of an answer: a `Delta` per token, and a `Summary` last. Takes what `generate` takes.

        Closing the generator aborts the request and frees what it holds.
        """
        yield from self.run(build_request(prompt, images=images, videos=videos, **options))

    def run(self, request: Request) -> Generator[Event]:
        """The events of a request that was built before."""
        yield from self.loop.stream_sync(request, self._encode(request))

    def _encode(self, request: Request) -> EncodedMedia:
        if request.media:
            self.engine.inputs.check_length(request)
        return encode(request, self.encode_parts)

    def generate_batch(self, prompts: Iterable[Mapping[str, object]], **options: object) -> list[Answer | MmError]:
        """Answer many questions together. The results are in the order of the questions.

        An error of one question is its result, and does not affect the others.

        Args:
            prompts: Arguments of `generate` as mappings: {"prompt": ..., "images": [...], "max_new_tokens": ...}.
            **options: For every question that does not set them itself.
        """
        results: dict[int, Answer | MmError] = {}
        indices, requests = list[int](), list[Request]()
        for i, item in enumerate(prompts):
            try:
                requests.append(_request_of({**options, **item}))
                indices.append(i)
            except MmError as error:
                results[i] = error
        for at, outcome in self.run_batch(requests):
            results[indices[at]] = outcome if isinstance(outcome, MmError) else collect(iter(outcome))
        return [results[i] for i in sorted(results)]

    def run_batch(self, requests: Iterable[Request]) -> Iterator[tuple[int, list[Event] | MmError]]:
        """The same for requests that were built before; see `mm.batch.generate_batch`."""
        return generate_batch(requests, self._encode, self.loop, full=self.config.max_num_seqs)

    @property
    def native_engine(self) -> LLMEngine:
        """The decoder's half with its layers and caches, for what only the native engine has.

        Raises:
            InvalidOption: The model is on another engine.
        """
        if not isinstance(self.engine, LLMEngine):
            what = f"was {self.config.engine!r}, and this needs the layers of the native engine; leave it out"
            raise InvalidOption("model", "engine", what)
        return self.engine

    def close(self) -> None:
        """Stop the model's threads. Requests that are under way get no more events."""
        self.loop.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load(
    model: str | Path = "tiny",
    *,
    reducer: str = "none",
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    **options: object,
) -> Model:
    """Load a model for use in this process.

    Args:
        model: "tiny", a local folder in Hugging Face format, or a hub name.
        reducer: Specification used when a call names none, such as "divprune:keep_ratio=0.25".
        dtype: "auto", "float32", "bfloat16", "float16" or the torch dtype.
        **options: Other settings, by the names of `ModelConfig` and of the dataclasses in it: `max_num_seqs=4`,
            `drafter="copy"`. Local paths are read unless `sources` says otherwise.

    Raises:
        MmError: The model or the reducer cannot be used.
    """
    name = str(dtype).removeprefix("torch.")
    options.setdefault("sources", SourcePolicy(allow_paths=True))
    return Model(model_config(model=str(model), reducer=reducer, device=device, dtype=name, **options))


def collect(events: Iterator[Event]) -> Answer:
    """Fold a stream of events into an answer."""
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[TokenLogprob]] = {}
    reasons: dict[int, str] = {}
    summary: Summary | None = None
    for event in events:
        if isinstance(event, Summary):
            summary = event
            continue
        texts[event.choice] = texts.get(event.choice, "") + event.text
        tokens.setdefault(event.choice, []).extend(event.token_ids)
        if event.logprobs:
            logprobs.setdefault(event.choice, []).extend(event.logprobs)
        if event.finish_reason:
            reasons[event.choice] = event.finish_reason
    assert summary is not None, "a stream that ends without an error ends with its summary"
    order = sorted(texts)
    return Answer(
        texts=tuple(texts[i] for i in order),
        finish_reasons=tuple(reasons[i] for i in order),
        token_ids=tuple(tuple(tokens[i]) for i in order),
        usage=summary.usage,
        timings=summary.timings,
        kept=summary.kept,
        reducer=summary.reducer,
        reducer_faults=summary.reducer_faults,
        kv_bytes=summary.kv_bytes,
        logprobs=tuple(tuple(logprobs[i]) for i in sorted(logprobs)),
    )


SAMPLING_FIELDS = {f.name for f in dataclasses.fields(SamplingParams)}
VISION_FIELDS = {"reducer", "keep_ratio", "positions", "max_visual_tokens", "return_map"}
FRAME_FIELDS = {f.name for f in dataclasses.fields(FrameSampling)}
REQUEST_FIELDS = {"priority", "timeout_s", "cache_salt", "speculation"}
FIELDS = SAMPLING_FIELDS | VISION_FIELDS | FRAME_FIELDS | REQUEST_FIELDS
"""Options of `Model.generate`. The dataclasses that declare them check their values."""


def build_request(
    prompt: str | Sequence[Mapping[str, object]],
    *,
    images: Sequence[MediaInput] = (),
    videos: Sequence[MediaInput] = (),
    **options: object,
) -> Request:
    """A `Request` from what a Python caller has; see `Model.generate`.

    Raises:
        InvalidRequest: An option does not exist or a value cannot be used.
    """
    if unknown := sorted(options.keys() - FIELDS):
        raise InvalidRequest(f"unknown option {unknown[0]!r}; allowed: {', '.join(sorted(FIELDS))}", unknown[0])
    extra = [_media(x, "image", f"images[{i}]") for i, x in enumerate(images)]
    extra += [_media(x, "video", f"videos[{i}]") for i, x in enumerate(videos)]
    messages, media = _conversation(prompt, extra)
    given: dict[str, Any] = options

    def chosen(names: set[str]) -> dict[str, Any]:
        return {name: given[name] for name in names & given.keys()}

    frames = {name: value for name, value in chosen(FRAME_FIELDS).items() if value is not None}
    return Request(
        request_id=uuid.uuid4().hex,
        messages=messages,
        media=media,
        sampling=SamplingParams(**chosen(SAMPLING_FIELDS)),
        vision=VisionOptions(
            **dict[str, Any]({"return_map": True}) | chosen(VISION_FIELDS),
            frames=FrameSampling(**frames) if frames else None,
        ),
        **chosen(REQUEST_FIELDS - {"speculation"}),
        speculation=_speculation(given.get("speculation")),
    )


def _request_of(arguments: Mapping[str, object]) -> Request:
    """As `build_request`, from all its arguments in one mapping."""
    named: dict[str, Any] = dict(arguments)
    if "prompt" not in named:
        raise InvalidRequest('a question of a batch needs "prompt"', "prompt")
    return build_request(**named)


def _speculation(value: Any) -> SpeculationOptions:
    """`speculation=` is a drafter's name, a mapping of `SpeculationOptions`' fields, or the options themselves."""
    if value is None or isinstance(value, SpeculationOptions):
        return value or SpeculationOptions()
    fields: Any = {"drafter": value} if isinstance(value, str) else value
    allowed = {f.name for f in dataclasses.fields(SpeculationOptions)}
    if not isinstance(fields, Mapping) or not set(cast(Mapping[str, object], fields)) <= allowed:
        raise InvalidRequest(
            f"speculation was {value!r}; give a drafter's name or a mapping with {', '.join(sorted(allowed))}",
            "speculation",
        )
    return SpeculationOptions(**cast(dict[str, Any], dict(cast(Mapping[str, object], fields))))


def _conversation(
    prompt: str | Sequence[Mapping[str, object]], extra: list[Media]
) -> tuple[tuple[Message, ...], tuple[Media, ...]]:
    """Messages and media, with `extra` put before the text of a plain prompt."""
    if isinstance(prompt, str):
        parts = [MediaPart(index=i, kind=item.kind) for i, item in enumerate(extra)]
        return (Message(role="user", parts=(*parts, TextPart(text=prompt))),), tuple(extra)
    if extra:
        raise InvalidRequest("give media either inside the messages or as images= and videos=, not both", "messages")
    return parse_messages(prompt)


def _media(item: MediaInput, kind: Kind, param: str) -> Media:
    if isinstance(item, Image | Video):
        return item
    in_memory = isinstance(item, PIL.Image.Image | np.ndarray) and kind == "image"
    if in_memory or isinstance(item, bytes | Path):
        return MediaSource(kind=kind, source=item, param=param)
    if isinstance(item, str):
        remote = item.startswith(("data:", "http:", "https:"))
        return MediaSource(kind=kind, source=item if remote else Path(item), param=param)
    raise InvalidRequest(f"cannot use a {type(item).__name__} as {kind}; give a path, bytes or a data: URL", param)
