"""Where the two halves of a request run: in this process, or in Ray replicas.

The HTTP layer sees both through the `Runtime` protocol. Nothing here knows HTTP or Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from mm.data.media import Kind
from mm.data.outputs import Event
from mm.data.request import Request, TextLimits
from mm.data.tokens import EncodedMedia, ItemCount
from mm.encode.clip_stream import ClipProgress, OnProgress
from mm.engine.loop import EngineLoop
from mm.engine.stats import EngineStats
from mm.errors import CapacityError
from mm.plugins.calls import StageStatus
from mm.plugins.spec import configured_reducer
from serve.config import ServeConfig
from serve.places import Places
from serve.routing_stats import RoutingStats


class Unavailable(CapacityError):
    """A replica is gone, or none is ready yet."""

    code = "unavailable"


class StageMissing(Unavailable):
    """A part of the server that the request needs has no replica.

    Args:
        stage: Name of the part.
    """

    def __init__(self, stage: str, retry_after_s: int) -> None:
        super().__init__(stage, retry_after_s)
        self.stage = stage

    def __str__(self) -> str:
        return f"no {self.stage} is running; one is being started, so try again in {self.retry_after_s} s"


class MediaLost(Unavailable):
    """The encoded media are gone, because the replica that held them is."""


class KVLost(Unavailable):
    """Keys and values that a prefill replica computed are gone, because the replica is."""


class MediaHandle(Protocol):
    """Encoded media of a request, as a runtime hands them from `encode` to `stream`."""

    @property
    def reducer(self) -> str:
        """Canonical text of the reducer."""
        ...

    @property
    def num_items(self) -> int: ...

    @property
    def num_cache_hits(self) -> int:
        """Items that the encoder's cache held."""
        ...

    @property
    def media_bytes(self) -> Mapping[Kind, int]:
        """Size of the encoded files, by kind."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What clients may know about the loaded model."""

    kinds: tuple[str, ...]
    max_context_tokens: int
    num_token_ids: int
    default_reducer: str

    @classmethod
    def of(cls, kinds: tuple[str, ...], limits: TextLimits, default_reducer: str) -> ModelInfo:
        """What an encoder and a decoder say of themselves."""
        tokens, ids = limits.max_context_tokens, limits.num_token_ids
        return cls(kinds=kinds, max_context_tokens=tokens, num_token_ids=ids, default_reducer=default_reducer)


@dataclass
class TransferStats:
    """What one ingress saw move from prefill to decode by one transport.

    Attributes:
        num_requests: Requests of which something moved.
        num_bytes: Keys, values and states.
    """

    num_requests: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class DecoderLoad:
    """Sequences in the decoders: running, and in waiting queues.

    Attributes:
        engines: The own figures of every decoder and every prefill replica.
        routing: What the ingress that asks decided, by stage.
        transfers: What it saw move from prefill to decode, by transport; every transport that may be used is there.
    """

    num_running: int
    num_waiting: int
    engines: tuple[EngineStats, ...] = ()
    routing: Mapping[str, RoutingStats] = field(default_factory=dict[str, RoutingStats])
    transfers: Mapping[str, TransferStats] = field(default_factory=dict[str, TransferStats])

    @classmethod
    def of(cls, stats: EngineStats) -> DecoderLoad:
        """The load of one decoder."""
        return cls(num_running=stats.num_running, num_waiting=stats.num_waiting, engines=(stats,))


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether a request could be answered now.

    Attributes:
        missing: Stages without a replica.
        silent: Stages with replicas that do not answer.
    """

    missing: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        return not self.missing and not self.silent


@dataclass(frozen=True, kw_only=True)
class PromptCount:
    """The tokens of a prompt.

    Attributes:
        num_tokens: Text and visual tokens.
        items: The visual tokens of each media item.
    """

    num_tokens: int
    items: tuple[ItemCount, ...]


class Runtime(Protocol):
    """What the HTTP layer needs of the machinery below it."""

    async def admit(self, request: Request) -> None:
        """Check that a chat request could be answered, before its media are encoded.

        Raises:
            StageMissing: There is no decoder, and none came in a second.
            ContextTooLong, InvalidRequest: Its text alone is too long.
        """
        ...

    def place(self, request: Request) -> AbstractAsyncContextManager[None]:
        """A place at the decoder until the context ends, taken before media are encoded. Waits until there is one."""
        ...

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> MediaHandle:
        """Encode and reduce the request's media; also checks the reducer that it names.

        Args:
            on_progress: Told, in any thread, how far a clip is that is taken chunk by chunk. A runtime whose encoder
                is in another process tells nothing.
        """
        ...

    async def count(self, request: Request) -> PromptCount:
        """The tokens that a request's prompt would have. No tower runs, and nothing is generated."""
        ...

    async def token_ids(self, request: Request) -> list[int]:
        """The tokens of a request without media."""
        ...

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that tokens stand for."""
        ...

    async def collect(self, media: MediaHandle) -> EncodedMedia:
        """The encoded media themselves, in this process."""
        ...

    def stream(self, request: Request, media: MediaHandle) -> AsyncGenerator[list[Event]]:
        """Events as they come: the first at once, then whatever is ready. Closing the generator aborts the request."""
        ...

    async def complete(self, request: Request, media: MediaHandle) -> list[Event]:
        """All events. Cancelling the task aborts the request."""
        ...

    async def info(self) -> ModelInfo: ...

    async def load(self) -> DecoderLoad: ...

    async def health(self) -> Health:
        """Whether a request could be answered now. It never generates, and takes less than a second."""
        ...

    async def status(self) -> StageStatus:
        """Why parts of the server should be replaced, and which plugins are switched off."""
        ...

    def drain(self) -> None:
        """Refuse new requests from now on. Those that were accepted are completed."""
        ...


def joined(statuses: Iterable[StageStatus]) -> StageStatus:
    """The status of several parts of a server. What several of them say is said once."""
    every = list(statuses)
    off = {(one.kind, one.name): one for status in every for one in status.plugins_off}
    problems = dict.fromkeys(problem for status in every for problem in status.problems)
    return StageStatus(problems=tuple(problems), plugins_off=tuple(off.values()))


def needs_encoder(request: Request) -> bool:
    """Whether the encoder has anything to do: media to encode, or a reducer to check."""
    return bool(request.media) or request.vision.reducer is not None or request.vision.keep_ratio is not None


def needs_long_check(request: Request, limits: TextLimits) -> bool:
    """Whether a text has to be tokenised before media are encoded, since it may be too long."""
    return bool(request.media) and not limits.are_far_from(request.messages)


def default_reducer(config: ServeConfig) -> str:
    return configured_reducer(config.model).canonical


class EncoderHalf(Protocol):
    """What `LocalRuntime` needs of an encoder stage."""

    kinds: tuple[str, ...]

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> EncodedMedia: ...

    async def count(self, request: Request) -> tuple[ItemCount, ...]: ...

    def status(self) -> StageStatus: ...

    def close(self) -> None: ...


class LocalRuntime:
    """Both halves in this process.

    Args:
        loop: The decoder's engine, started.
        limits: How long texts may be.
        num_places: Sequences that the engine takes, running or waiting.
    """

    def __init__(
        self, encoder: EncoderHalf, loop: EngineLoop, *, limits: TextLimits, default_reducer: str, num_places: int
    ) -> None:
        self._encoder, self._loop, self._limits = encoder, loop, limits
        self._places = Places(num_places)
        self._info = ModelInfo.of(encoder.kinds, limits, default_reducer)

    async def admit(self, request: Request) -> None:
        self._limits.check(request.messages)
        if needs_long_check(request, self._limits):
            await self._loop.check_length(request)

    def place(self, request: Request) -> AbstractAsyncContextManager[None]:
        return self._places.taken(request.sampling.n, request.priority)

    async def encode(self, request: Request, on_progress: OnProgress | None = None) -> EncodedMedia:
        """The encoded media. What is certain of a long clip is prefilled while the rest is still encoded."""
        if not needs_encoder(request):
            return EncodedMedia(reducer=self._info.default_reducer)

        def tell(progress: ClipProgress) -> None:
            if progress.settled is not None and len(request.media) == 1:
                self._loop.prefill(request, progress.settled)
            if on_progress is not None:
                on_progress(progress)

        return await self._encoder.encode(request, tell)

    async def count_items(self, request: Request) -> tuple[ItemCount, ...]:
        """The visual tokens that the request's items will have. No tower runs."""
        return await self._encoder.count(request) if needs_encoder(request) else ()

    async def count(self, request: Request) -> PromptCount:
        await self.admit(request)
        items = await self.count_items(request)
        return PromptCount(num_tokens=await self._loop.prompt_length(request, items), items=items)

    async def token_ids(self, request: Request) -> list[int]:
        self._limits.check(request.messages)
        return await self._loop.token_ids(request)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        return await self._loop.text_of(token_ids)

    async def collect(self, media: MediaHandle) -> EncodedMedia:
        assert isinstance(media, EncodedMedia), "media of another runtime"
        return media

    def stream(self, request: Request, media: MediaHandle) -> AsyncGenerator[list[Event]]:
        assert isinstance(media, EncodedMedia), "media of another runtime"
        return self._loop.stream(request, media)

    async def complete(self, request: Request, media: MediaHandle) -> list[Event]:
        assert isinstance(media, EncodedMedia), "media of another runtime"
        return await self._loop.complete(request, media)

    async def info(self) -> ModelInfo:
        return self._info

    async def load(self) -> DecoderLoad:
        return DecoderLoad.of(self._loop.stats)

    async def health(self) -> Health:
        return Health()

    async def status(self) -> StageStatus:
        return joined([self._encoder.status(), self._loop.status()])

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return self._loop.stats.kv_total_bytes

    def drain(self) -> None:
        self._loop.drain()

    def close(self) -> None:
        """Stop. Requests that are not finished get no more events."""
        self._encoder.close()
        self._loop.close()
