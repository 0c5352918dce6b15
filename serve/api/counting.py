"""`POST /v1/chat/completions/count`: the tokens that a chat request would cost, before any of them is computed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mm.data.tokens import ItemCount
from serve.api.chat import Chat, unless_gone, until
from serve.api.parse import parse_chat
from serve.api.render import JsonObject, to_json
from serve.config import ServeConfig
from serve.runtime import PromptCount, Runtime


class Counting:
    """Answers counting requests, within the limits of the chat requests. Their body is that of a chat request."""

    def __init__(self, chat: Chat, runtime: Runtime, config: ServeConfig) -> None:
        self._chat, self._runtime, self._config = chat, runtime, config

    async def answer(self, http: HttpRequest) -> Response:
        """The response. An error is returned as a response too."""
        return await self._chat.respond(http, self._count)

    async def _count(self, http: HttpRequest, content: Any, _: AsyncExitStack) -> Response:
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        call = parse_chat(content, http.state.request_id, self._config, http.state.tenant)
        async with until(deadline):
            count = await unless_gone(http, self._runtime.count(call.request))
        headers = {"x-mm-ignored-fields": ", ".join(call.ignored)} if call.ignored else {}
        return Response(to_json(_body(call.model, count)), media_type="application/json", headers=headers)


def _body(model: str, count: PromptCount) -> JsonObject:
    def total(kind: str) -> int:
        return sum(item.num_tokens for item in count.items if item.kind == kind)

    return {
        "object": "chat.completion.count",
        "model": model,
        "usage": {
            "prompt_tokens": count.num_tokens,
            "prompt_tokens_details": {"image_tokens": total("image"), "video_tokens": total("video")},
        },
        "vision": {
            "visual_tokens_in": sum(item.num_tokens_in for item in count.items),
            "visual_tokens": sum(item.num_tokens for item in count.items),
            "is_exact": all(item.is_exact for item in count.items),
            "items": [_item(item) for item in count.items],
        },
    }


def _item(item: ItemCount) -> JsonObject:
    return {"type": item.kind, "visual_tokens_in": item.num_tokens_in, "visual_tokens": item.num_tokens}


def add_counting(app: FastAPI, counting: Counting, body: JsonObject) -> None:
    """Add the route.

    Args:
        body: The `requestBody` that the OpenAPI document shows.
    """

    @app.post("/v1/chat/completions/count", openapi_extra={"requestBody": body}, response_class=Response)
    async def count_tokens(http: HttpRequest) -> Response:
        return await counting.answer(http)
