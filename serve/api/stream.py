"""Server-Sent Events: frames of an answer that comes piece by piece.

One frame per delta, however the runtime batches them, so that both runtimes send the same bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm.data.outputs import Delta, Event, Summary
from serve.api.errors import Failure
from serve.api.render import Head, accepted_fields, chunk, speculation_fields, to_json, usage_fields, vision_fields
from serve.api.schema import ChatCall

DONE = b"data: [DONE]\n\n"


def frame(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


@dataclass(kw_only=True)
class Framer:
    """Turns the events of one request into frames; remembers what the last frames need."""

    head: Head
    call: ChatCall
    num_prompt_tokens: int | None = None
    num_completion_tokens: int = 0
    failed: bool = field(default=False, init=False)

    def start(self) -> Iterator[bytes]:
        """Each choice's role, before anything else."""
        for choice in range(self.call.request.sampling.n):
            yield self._frame(chunk(self.head, choice, {"role": "assistant", "content": ""}))

    def frames(self, events: Sequence[Event]) -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Summary):
                yield from self._end(event)
            else:
                yield from self._delta(event)

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        self.num_completion_tokens += len(delta.token_ids)
        if delta.num_prompt_tokens is not None:
            self.num_prompt_tokens = delta.num_prompt_tokens
        # A token whose text is held back still tells its log-probability, and who said it first.
        if delta.text or delta.logprobs or (self.call.return_accepted and delta.token_ids):
            fields = chunk(self.head, delta.choice, {"content": delta.text}, None, delta.logprobs)
            if self.call.return_accepted:
                fields["speculation"] = accepted_fields(len(delta.token_ids), delta.num_drafted)
            yield self._frame(fields)
        if delta.finish_reason is not None:
            yield self._frame(chunk(self.head, delta.choice, {}, delta.finish_reason))

    def _frame(self, fields: dict[str, Any]) -> bytes:
        """A chunk with the counts so far, where they are asked for."""
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
        """The last chunk: no choices; usage and drafting when asked for, and what became of the visual tokens."""
        vision = self.call.request.vision
        wants_vision = vision.return_map or vision.return_timings or bool(self.call.request.media)
        if not (self.call.include_usage or wants_vision or self.call.return_accepted):
            return
        last = self.head.fields("chat.completion.chunk") | {"choices": []}
        if self.call.include_usage:
            last["usage"] = usage_fields(summary.usage)
        last["vision"] = vision_fields(summary, return_map=vision.return_map, return_timings=vision.return_timings)
        if self.call.return_accepted:
            last["speculation"] = speculation_fields(summary.usage)
        yield frame(last)


async def sse(
    framer: Framer,
    first: Sequence[Event],
    rest: AsyncGenerator[list[Event]],
    on_error: Callable[[BaseException], Failure],
) -> AsyncIterator[bytes]:
    """The body of a streamed answer whose first events have already come.

    Args:
        on_error: What the client is told about a failure in the middle; the status has already gone out.
    """
    try:
        yield b"".join([*framer.start(), *framer.frames(first)])
        async for events in rest:
            if frames := b"".join(framer.frames(events)):
                yield frames
    except Exception as error:
        framer.failed = True
        yield frame(on_error(error).body)
    finally:
        await rest.aclose()
    yield DONE
