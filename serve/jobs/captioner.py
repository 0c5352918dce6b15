"""One item's journey in a batch job: file -> bytes -> visual tokens -> caption -> record.

`load` runs in one thread; `begin` and `complete` in another, between which the model answers many items together.
An error of one item becomes a record with a fixed text, and the job goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mm.api import collect
from mm.build import build_decoder, build_encode_parts
from mm.config import SourcePolicy
from mm.data.media import MediaFile, MediaSource
from mm.data.outputs import Event, Timings
from mm.data.request import MediaPart, Message, Request, TextPart
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import EncodedMedia
from mm.encode.parts import EncodeParts
from mm.encode.pipeline import encode
from mm.engine.loop import EngineLoop, Submitted
from mm.errors import MmError, RequestError
from mm.media import MediaBudget, content_hash, fetch
from serve.jobs.discover import Item
from serve.jobs.job import CaptionJob
from serve.jobs.results import Version

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Step = Literal["load", "encode", "answer"]


class Answering(Protocol):
    """An item that the model is answering."""

    @property
    def is_done(self) -> bool: ...

    def events(self) -> Iterator[Event]:
        """All events; waits for those that have not come yet."""
        ...


class Captioner(Protocol):
    """The two halves of a loaded model, as a job uses them."""

    def prepare_thread(self) -> None:
        """Called once in the thread that will call `encode`."""
        ...

    def encode(self, request: Request, budget: MediaBudget) -> EncodedMedia: ...

    def answer(self, request: Request, encoded: EncodedMedia) -> Answering:
        """Begin to answer an item; each call of `step` continues it."""
        ...

    def step(self) -> bool:
        """Compute one step for all items that were begun. Returns whether there was anything to do."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalCaptioner:
    """A model in this process."""

    parts: EncodeParts
    loop: EngineLoop
    num_threads: int | None

    @classmethod
    def build(cls, job: CaptionJob) -> LocalCaptioner:
        """Load the job's model.

        Raises:
            MmError: It or its reducer cannot be used.
        """
        # No feature cache: every file is seen once, and equal files share a caption already.
        config = replace(job.model, cache_bytes=0)
        parts, loop = build_encode_parts(config), EngineLoop(build_decoder(config), num_threads=config.num_threads)
        return cls(parts=parts, loop=loop, num_threads=config.num_threads)

    def prepare_thread(self) -> None:
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)  # torch keeps this per thread

    def encode(self, request: Request, budget: MediaBudget) -> EncodedMedia:
        return encode(request, self.parts, budget)

    def answer(self, request: Request, encoded: EncodedMedia) -> Answering:
        return _InEngine(self.loop, self.loop.submit(request, encoded))

    def step(self) -> bool:
        return self.loop.step()


@dataclass(frozen=True)
class _InEngine:
    loop: EngineLoop
    submitted: Submitted

    @property
    def is_done(self) -> bool:
        return self.submitted.queue.has_ended

    def events(self) -> Iterator[Event]:
        return self.loop.read(self.submitted)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an item has no caption.

    Attributes:
        is_fault: The cause is not the item but the model, a plugin or this machine.
    """

    step: Step
    code: str
    reason: str
    is_fault: bool

    @classmethod
    def of(cls, error: Exception, step: Step, path: str) -> Failure:
        """Our errors have a text for the user. Of other errors only the class is named, and the traceback is logged."""
        is_fault = not isinstance(error, RequestError)
        if isinstance(error, MmError):
            return cls(step=step, code=error.code, reason=str(error), is_fault=is_fault)
        logger.error("item fault step=%s path=%r", step, path, exc_info=error)
        reason = f"an unexpected fault in the step {step!r} ({type(error).__name__}); the log has the details"
        return cls(step=step, code="internal_error", reason=reason, is_fault=True)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An item on its way from the loading thread to the answering one.

    Attributes:
        version: The file as it was before it was read.
        content_hash: Names its bytes; None when they could not be read.
        request, encoded: None when an equal file has a caption already, and after a failure.
        read_s: Seconds to read and hash the file.
    """

    item: Item
    version: Version
    content_hash: str | None = None
    request: Request | None = None
    encoded: EncodedMedia = field(default_factory=EncodedMedia)
    read_s: float = 0.0
    failure: Failure | None = None


def read_file(item: Item, budget: MediaBudget) -> tuple[MediaFile, str]:
    """The file and the hash of its content.

    Raises:
        MediaError: It cannot be read, is empty, or is larger than allowed.
    """
    source = MediaSource(kind=item.kind, source=Path(item.path))
    data = fetch(source, SourcePolicy(allow_paths=True), budget)
    return MediaFile(kind=item.kind, data=data), content_hash(item.kind, data)


def load(item: Item, job: CaptionJob, captioner: Captioner, is_known: Callable[[str], bool]) -> Loaded:
    """Read and encode one item.

    Args:
        is_known: Whether content of that hash has a caption already and need not be encoded.
    """
    version = Version.of(item.path)  # before reading, so that the next run notices a change in between
    step: Step = "load"
    try:
        start = time.perf_counter()
        budget = MediaBudget(job.model.limits)
        file, name = read_file(item, budget)
        loaded = Loaded(item=item, version=version, content_hash=name, read_s=time.perf_counter() - start)
        if is_known(name):
            return loaded
        step = "encode"
        request = _request(file, job)
        encoded = captioner.encode(request, budget)
        return replace(loaded, request=replace(request, media=()), encoded=encoded)
    except Exception as error:
        return Loaded(item=item, version=version, failure=Failure.of(error, step, item.path))


def _request(file: MediaFile, job: CaptionJob) -> Request:
    parts = (MediaPart(index=0, kind=file.kind), TextPart(text=job.prompt_for(file.kind)))
    return Request(
        request_id=uuid.uuid4().hex,
        messages=(Message(role="user", parts=parts),),
        media=(file,),
        sampling=SamplingParams(max_new_tokens=job.max_tokens, temperature=0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An item that the model may be answering.

    Attributes:
        answering: None when nothing is to be answered, or an equal item is being answered.
    """

    loaded: Loaded
    answering: Answering | None = None

    @property
    def is_done(self) -> bool:
        return self.answering is None or self.answering.is_done


def begin(loaded: Loaded, captioner: Captioner) -> Begun:
    """Begin to answer an item."""
    if loaded.request is None:
        return Begun(loaded=loaded)
    try:
        return Begun(loaded=loaded, answering=captioner.answer(loaded.request, loaded.encoded))
    except Exception as error:
        return Begun(loaded=replace(loaded, failure=Failure.of(error, "answer", loaded.item.path)))


def complete(begun: Begun, model: str, captioner: Captioner, equal: Mapping[str, Any] | None) -> Record | Failure:
    """The item's caption as a record, or why there is none.

    Args:
        equal: The record of an item of the same content, whose caption this one shares.
    """
    loaded = begun.loaded
    if loaded.failure is None and equal is not None:
        return _shared(loaded, equal)
    if begun.answering is None and loaded.failure is None:  # an equal item failed
        assert loaded.request is not None, "an item is only loaded without a request when an equal one has a caption"
        begun = begin(loaded, captioner)
    if begun.loaded.failure is not None:
        return begun.loaded.failure
    assert begun.answering is not None
    try:
        result = collect(begun.answering.events())
    except Exception as error:
        return Failure.of(error, "answer", loaded.item.path)
    record = {
        **_identity(loaded),
        "caption": result.text,
        "finish_reason": result.finish_reasons[0],
        "num_visual_tokens_in": result.usage.num_visual_tokens_in,
        "num_visual_tokens_kept": result.usage.num_visual_tokens_kept,
        "num_prompt_tokens": result.usage.num_prompt_tokens,
        "num_completion_tokens": result.usage.num_completion_tokens,
        "timings": _timings(result.timings, loaded.read_s),
        "model": model,
        "reducer": result.reducer,
    }
    # Only if there are some: with the policy `keep_all`, the errors after which a reducer's tokens were all kept.
    return record | ({"reducer_faults": list(result.reducer_faults)} if result.reducer_faults else {})


def failure_record(loaded: Loaded, failure: Failure) -> Record:
    record = _identity(loaded) | {"step": failure.step, "code": failure.code, "reason": failure.reason}
    record.pop("content_hash")  # only captions are found by content
    return record


def _shared(loaded: Loaded, equal: Mapping[str, Any]) -> Record:
    origin = equal.get("same_as", equal["path"])
    return {**equal, **_identity(loaded), "timings": _timings(Timings(), loaded.read_s), "same_as": origin}


def _identity(loaded: Loaded) -> Record:
    return {
        "path": loaded.item.path,
        "kind": loaded.item.kind,
        "size_bytes": loaded.version.size_bytes,
        "mtime_ns": loaded.version.mtime_ns,
        "content_hash": loaded.content_hash,
    }


def _timings(timings: Timings, read_s: float) -> dict[str, float]:
    """Seconds by stage, to the microsecond; reading the file counts as loading."""
    whole = replace(timings, load_s=timings.load_s + read_s)
    return {name: round(value, 6) for name, value in dataclasses.asdict(whole).items()}
