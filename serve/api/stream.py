"""Server-Sent Events: the chunks of a streamed response.

Each delta becomes one chunk, however the runtime batches them, so that both runtimes send the same bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mm.data.outputs import Delta, Event, Summary
from mm.encode.clip_stream import ClipProgress
from serve.api.errors import ErrorResponse
from serve.api.parse import ChatCall
from serve.api.progress import comment
from serve.api.render import (
    JsonObject,
    ResponseMeta,
    accepted_fields,
    chunk,
    speculation_fields,
    to_json,
    usage_fields,
    vision_fields,
)
from serve.api.tools import CallReader, Tools, call_fields, finish_reason

DONE = b"data: [DONE]\n\n"

News = list[Event] | ClipProgress
"""What a stream is made of: events, and before them how far a clip is that is taken chunk by chunk."""


def frame(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


@dataclass(kw_only=True)
class ChunkWriter:
    """Writes the events of one request as frames, and keeps the counts that later frames need."""

    meta: ResponseMeta
    call: ChatCall
    num_prompt_tokens: int | None = None
    num_completion_tokens: int = 0
    finished: set[int] = field(default_factory=set[int], init=False)
    readers: dict[int, CallReader] = field(default_factory=dict[int, CallReader], init=False)

    def start(self) -> Iterator[bytes]:
        """The first frame of each choice, which has its role."""
        for choice in range(self.call.request.sampling.n):
            yield self._frame(chunk(self.meta, choice, {"role": "assistant", "content": ""}))

    def frames(self, events: Sequence[Event]) -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Summary):
                yield from self._end(event)
            else:
                yield from self._delta(event)

    def error(self, error: ErrorResponse) -> bytes:
        """The end of a stream that cannot go on: each unfinished choice ends, then comes the error."""
        open_choices = [choice for choice in range(self.call.request.sampling.n) if choice not in self.finished]
        ends = [self._frame(chunk(self.meta, choice, {}, "error")) for choice in open_choices]
        return b"".join([*ends, frame(error.body)])

    def end(self) -> bytes:
        return DONE

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        self.num_completion_tokens += len(delta.token_ids)
        if delta.num_prompt_tokens is not None:
            self.num_prompt_tokens = delta.num_prompt_tokens
        if self.call.tools is not None:
            yield from self._with_calls(delta, self.call.tools)
            return
        # A token whose text is held back still has a log-probability, and may have been drafted.
        if delta.text or delta.logprobs or (self.call.return_accepted and delta.token_ids):
            fields = chunk(self.meta, delta.choice, {"content": delta.text}, None, delta.logprobs)
            if self.call.return_accepted:
                fields["speculation"] = accepted_fields(len(delta.token_ids), delta.num_drafted)
            yield self._frame(fields)
        if delta.finish_reason is not None:
            self.finished.add(delta.choice)
            yield self._frame(chunk(self.meta, delta.choice, {}, delta.finish_reason))

    def _with_calls(self, delta: Delta, tools: Tools) -> Iterator[bytes]:
        """The chunks of a choice whose text may hold calls."""
        reader = self.readers.setdefault(delta.choice, CallReader(tools=tools))
        pieces = reader.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += reader.finish()
        shown: list[JsonObject] = [{"content": piece.text} for piece in pieces if piece.call is None]
        shown += [{"tool_calls": [entry]} for entry in call_fields(pieces)]
        logprobs = delta.logprobs
        for fields in shown or ([{"content": ""}] if logprobs else []):
            yield self._frame(chunk(self.meta, delta.choice, fields, None, logprobs))
            logprobs = ()
        if delta.finish_reason is not None:
            self.finished.add(delta.choice)
            reason = finish_reason(delta.finish_reason, tools, reader.num_calls)
            yield self._frame(chunk(self.meta, delta.choice, {}, reason))

    def _frame(self, fields: JsonObject) -> bytes:
        """A chunk, with the counts so far where the request asks for them."""
        if self.call.continuous_usage and self.num_prompt_tokens is not None:
            fields["usage"] = {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_completion_tokens,
                "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            }
        elif self.call.include_usage:
            fields["usage"] = None
        return frame(fields)

    def _end(self, summary: Summary) -> Iterator[bytes]:
        """The last chunk, without choices: usage, visual tokens and drafting, where the request asks for them."""
        vision = self.call.request.vision
        wants_vision = vision.return_map or vision.return_timings or bool(self.call.request.media)
        if not (self.call.include_usage or wants_vision or self.call.return_accepted):
            return
        last = self.meta.fields("chat.completion.chunk") | {"choices": []}
        if self.call.include_usage:
            last["usage"] = usage_fields(summary.usage)
        last["vision"] = vision_fields(summary, return_map=vision.return_map, return_timings=vision.return_timings)
        if self.call.return_accepted:
            last["speculation"] = speculation_fields(summary.usage)
        yield frame(last)


class Writer(Protocol):
    """Writes the events of one request as the frames of a streamed response."""

    def start(self) -> Iterator[bytes]: ...
    def frames(self, events: Sequence[Event]) -> Iterator[bytes]: ...

    def error(self, error: ErrorResponse) -> bytes:
        """What ends the response after an error."""
        ...

    def end(self) -> bytes:
        """What follows the last frame."""
        ...


def _frames(writer: Writer, news: News) -> Iterator[bytes]:
    return iter([comment(news)]) if isinstance(news, ClipProgress) else writer.frames(news)


async def sse(
    writer: Writer,
    first: News,
    rest: AsyncGenerator[News],
    on_error: Callable[[BaseException], ErrorResponse],
) -> AsyncIterator[bytes]:
    """The body of a streamed response.

    Args:
        first: What came before the status was sent.
        on_error: What clients read of an error after that.
    """
    try:
        yield b"".join([*writer.start(), *_frames(writer, first)])
        async for news in rest:
            if frames := b"".join(_frames(writer, news)):
                yield frames
    except Exception as error:
        yield writer.error(on_error(error))
    finally:
        await rest.aclose()
    if last := writer.end():
        yield last
