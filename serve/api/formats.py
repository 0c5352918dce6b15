"""The two forms in which a request for text may come: chat completions and OpenAI's Responses API.

A form says how its body becomes that of a chat request, and how events become its response, whole or streamed.
Everything between is `serve.api.chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mm.data.outputs import Event
from serve.api.parse import ChatCall
from serve.api.render import JsonObject, ResponseMeta, completion
from serve.api.responses import ResponseWriter, response
from serve.api.responses_body import to_chat
from serve.api.stream import ChunkWriter, Writer


class Form(Protocol):
    """How requests and responses of one endpoint look."""

    def to_chat(self, body: Any) -> Any:
        """The body of the chat request that `body` stands for."""
        ...

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, events: Sequence[Event]) -> JsonObject:
        """The response of a request that does not stream."""
        ...

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        """What writes the frames of a stream."""
        ...


class ChatForm:
    """`POST /v1/chat/completions`."""

    def to_chat(self, body: Any) -> Any:
        return body

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, events: Sequence[Event]) -> JsonObject:
        return completion(
            meta,
            events,
            return_map=call.request.vision.return_map,
            return_timings=call.return_timings,
            return_accepted=call.return_accepted,
        )

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        return ChunkWriter(meta=meta, call=call)


class ResponsesForm:
    """`POST /v1/responses`."""

    def to_chat(self, body: Any) -> Any:
        return to_chat(body)

    def whole(self, meta: ResponseMeta, call: ChatCall, body: Any, events: Sequence[Event]) -> JsonObject:
        return response(meta, call, body, events)

    def writer(self, meta: ResponseMeta, call: ChatCall, body: Any) -> Writer:
        return ResponseWriter(meta=meta, call=call, asked=body)


CHAT, RESPONSES = ChatForm(), ResponsesForm()
