"""`POST /v1/responses`: OpenAI's Responses API over the same path as chat completions, whole or streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm.data.outputs import Delta, Event, Summary, TokenLogprob
from serve.api.errors import ErrorResponse
from serve.api.parse import ChatCall
from serve.api.render import JsonObject, ResponseMeta, logprobs_fields, summary_of, to_json, vision_fields


def response(meta: ResponseMeta, call: ChatCall, asked: JsonObject, events: Sequence[Event]) -> JsonObject:
    """The `response` object of a request that does not stream.

    Args:
        asked: The body of the request, whose settings the response repeats.
    """
    writer = ResponseWriter(meta=meta, call=call, asked=asked)
    for event in events:
        if isinstance(event, Delta):
            writer.take(event)
    return writer.finished(summary_of(events))


@dataclass(kw_only=True)
class ResponseWriter:
    """Writes the events of one request as the server-sent events of the Responses API."""

    meta: ResponseMeta
    call: ChatCall
    asked: JsonObject
    text: str = field(default="", init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob], init=False)
    finish_reason: str | None = field(default=None, init=False)
    numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason

    def start(self) -> Iterator[bytes]:
        """The response, its message and the message's text, all empty."""
        body = self._body("in_progress", [])
        yield self._event("response.created", response=body)
        yield self._event("response.in_progress", response=body)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def frames(self, events: Sequence[Event]) -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Summary):
                yield from self._end(event)
            elif isinstance(event, Delta):
                self.take(event)
                if event.text or event.logprobs:
                    shown = logprobs_fields(event.logprobs)["content"]
                    yield self._event("response.output_text.delta", **self._place(), delta=event.text, logprobs=shown)

    def error(self, error: ErrorResponse) -> bytes:
        """The last event of a response that failed after it had begun."""
        message = error.body["error"]["message"]
        body = self._body("failed", []) | {"error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=body)

    def end(self) -> bytes:
        """What follows the last event: nothing here."""
        return b""

    def _end(self, summary: Summary) -> Iterator[bytes]:
        body = self.finished(summary)
        item = body["output"][0]
        shown = item["content"][0]
        yield self._event("response.output_text.done", **self._place(), text=self.text, logprobs=shown["logprobs"])
        yield self._event("response.content_part.done", **self._place(), part=shown)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{body['status']}", response=body)

    def finished(self, summary: Summary) -> JsonObject:
        """The whole response object; it is incomplete when the answer was cut."""
        cut = self.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        usage = summary.usage
        vision = self.call.request.vision
        return self._body(status, [self._item(status, [self._part(self.text)])]) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.num_completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            },
            "vision": vision_fields(summary, return_map=vision.return_map, return_timings=vision.return_timings),
        }

    def _body(self, status: str, output: list[JsonObject]) -> JsonObject:
        sampling, asked = self.call.request.sampling, self.asked
        text = asked.get("text")
        return {
            "id": f"resp_{self.meta.request_id}",
            "object": "response",
            "created_at": self.meta.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata") or {},
            "model": self.meta.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": text if isinstance(text, dict) and text.get("format") else {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _item(self, status: str, content: list[JsonObject]) -> JsonObject:
        item_id = self._place()["item_id"]
        return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> JsonObject:
        shown = logprobs_fields(self.logprobs)["content"] if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": shown}

    def _place(self) -> JsonObject:
        return {"item_id": f"msg_{self.meta.request_id}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = to_json({"type": kind, "sequence_number": next(self.numbers), **fields})
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"
