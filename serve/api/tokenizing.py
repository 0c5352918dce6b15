"""`POST /tokenize` and `POST /detokenize`, in vLLM's form: texts or conversations to token ids, and back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mm.errors import InvalidRequest, UnknownModel
from serve.api.chat import Chat, unless_gone, until
from serve.api.completions import with_prompt
from serve.api.parse import ChatCall, parse_chat, read_body
from serve.api.render import JsonObject, to_json
from serve.api.schema import TOKEN_ID, TemplateVariables
from serve.config import ServeConfig
from serve.runtime import Runtime

STRICT = ConfigDict(extra="forbid", strict=True)


class TokenizeBody(BaseModel):
    """The body of `POST /tokenize`: a prompt, or messages without media."""

    model_config = STRICT

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: list[Any] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: Annotated[bool, Field(description="Only true, as the model gets its prompts.")] | None = None
    add_generation_prompt: Annotated[bool, Field(description="Only true.")] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: TemplateVariables | None = None


class DetokenizeBody(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = STRICT

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": TOKEN_ID})]]


class Tokenizing:
    """Answers both, within the limits of the chat requests."""

    def __init__(self, chat: Chat, runtime: Runtime, config: ServeConfig) -> None:
        self._chat, self._runtime, self._config = chat, runtime, config

    async def tokenize(self, http: HttpRequest) -> Response:
        """The response. An error is returned as a response too."""
        return await self._chat.respond(http, self._tokenize)

    async def detokenize(self, http: HttpRequest) -> Response:
        """The response. An error is returned as a response too."""
        return await self._chat.respond(http, self._detokenize)

    async def _tokenize(self, http: HttpRequest, content: Any, _: AsyncExitStack) -> Response:
        body = read_body(TokenizeBody, content)
        self._check_model(body.model)
        for name in ("add_special_tokens", "add_generation_prompt"):
            if getattr(body, name) is False:
                what = f"{name} = false is not supported by this server; leave it out"
                raise InvalidRequest(what, name, "unsupported_parameter")
        call = self._call(body, http)
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        async with until(deadline):
            ids = await unless_gone(http, self._runtime.token_ids(call.request))
            strings = [await self._runtime.text_of([token]) for token in ids] if body.return_token_strs else None
        info = await self._runtime.info()
        return _json(
            {"count": len(ids), "max_model_len": info.max_context_tokens, "tokens": ids, "token_strs": strings}
        )

    async def _detokenize(self, http: HttpRequest, content: Any, _: AsyncExitStack) -> Response:
        body = read_body(DetokenizeBody, content)
        self._check_model(body.model)
        return _json({"prompt": await unless_gone(http, self._runtime.text_of(body.tokens))})

    def _call(self, body: TokenizeBody, http: HttpRequest) -> ChatCall:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give prompt or messages, one of them", "prompt")
        messages = body.messages if body.messages is not None else [{"role": "user", "content": "-"}]
        asked = {"model": self._config.names[0], "messages": messages, "tools": body.tools}
        asked |= {"chat_template_kwargs": body.chat_template_kwargs}
        call = parse_chat(asked, http.state.request_id, self._config, http.state.tenant)
        if call.request.media:
            what = "the tokens of media depend on the tower; ask /v1/chat/completions/count for their number"
            raise InvalidRequest(what, "messages")
        return call if body.prompt is None else with_prompt(call, body.prompt, 0)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self._config.names:
            raise UnknownModel(model, self._config.names)


def _json(content: JsonObject) -> Response:
    return Response(to_json(content), media_type="application/json")


def add_tokenizing(app: FastAPI, tokenizing: Tokenizing, bodies: tuple[JsonObject, JsonObject]) -> None:
    """Add the routes.

    Args:
        bodies: The `requestBody` of each that the OpenAPI document shows.
    """

    @app.post("/tokenize", openapi_extra={"requestBody": bodies[0]}, response_class=Response)
    async def tokenize(http: HttpRequest) -> Response:
        return await tokenizing.tokenize(http)

    @app.post("/detokenize", openapi_extra={"requestBody": bodies[1]}, response_class=Response)
    async def detokenize(http: HttpRequest) -> Response:
        return await tokenizing.detokenize(http)
