"""The forms in which a request for text may come: chat completions, OpenAI's Responses API, and its older completions.

A form says which calls its body makes, and how events become its response, whole or streamed. Everything between is
`serve.api.chat`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from mm.data.outputs import Event
from mm.errors import InvalidRequest
from serve.api import completions
from serve.api.parse import ChatCall
from serve.api.render import JsonObject, ResponseMeta, completion
from serve.api.responses import ResponseWriter, response
from serve.api.responses_body import to_chat
from serve.api.stream import ChunkWriter, Writer
from serve.api.tools import called

Parse = Callable[[Any], ChatCall]
"""Reads the body of a chat request."""


class Form(Protocol):
    """How requests and responses of one endpoint look."""

    def calls(self, body: Any, parse: Parse) -> list[ChatCall]:
        """The calls that a request makes; several only where it has several prompts."""
        ...

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, answers: Sequence[Sequence[Event]]) -> JsonObject:
        """The response of a request that does not stream, from the events of each of its calls."""
        ...

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        """What writes the frames of a stream."""
        ...


class ChatForm:
    """`POST /v1/chat/completions`."""

    def calls(self, body: Any, parse: Parse) -> list[ChatCall]:
        return [parse(body)]

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, answers: Sequence[Sequence[Event]]) -> JsonObject:
        options = {} if call.tools is None else {"message": partial(called, call.tools)}
        return completion(
            meta,
            answers[0],
            **options,
            return_map=call.request.vision.return_map,
            return_timings=call.return_timings,
            return_accepted=call.return_accepted,
        )

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        return ChunkWriter(meta=meta, call=call)


class ResponsesForm:
    """`POST /v1/responses`."""

    def calls(self, body: Any, parse: Parse) -> list[ChatCall]:
        return [parse(to_chat(body))]

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, answers: Sequence[Sequence[Event]]) -> JsonObject:
        return response(meta, call, body, answers[0])

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        return ResponseWriter(meta=meta, call=call, asked=body)


class CompletionsForm:
    """`POST /v1/completions`."""

    def calls(self, body: Any, parse: Parse) -> list[ChatCall]:
        prompts = completions.prompts_of(body)
        call = parse(completions.chat_body(body))
        if call.stream and len(prompts) > 1:
            raise InvalidRequest("a stream has one prompt; send several requests", "prompt")
        return [completions.with_prompt(call, prompt, i) for i, prompt in enumerate(prompts)]

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, answers: Sequence[Sequence[Event]]) -> JsonObject:
        return completions.whole(meta, answers)

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        return completions.CompletionWriter(meta=meta, call=call)


CHAT, RESPONSES, COMPLETIONS = ChatForm(), ResponsesForm(), CompletionsForm()
