"""`POST /v1/embeddings`: a vector for the images and clips of a conversation, in the form of vLLM's chat embeddings.

The vector is the mean of the visual tokens that the encoder and the reducer leave. The decoder is not used, so text is
no part of the vector; a query-aware reducer reads the last user message.
"""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mm.data.request import Request, VisionOptions
from mm.data.tokens import EncodedMedia
from mm.encode.pooling import mean_embedding
from mm.errors import InvalidRequest, shown
from mm.plugins.capabilities import INSIDE_DECODER
from mm.plugins.spec import reducer_or_default
from serve.api.chat import Chat, unless_gone, until
from serve.api.parse import parse_chat
from serve.api.render import JsonObject, to_json
from serve.api.schema import ChatBody, Vision
from serve.config import ServeConfig
from serve.runtime import Runtime, default_reducer

Encoding = Literal["float", "base64"]
VISION_FIELDS = ("reducer", "keep_ratio", "num_frames", "fps")
"""Fields of the `vision` object that have an effect on an embedding."""


class EmbeddingBody(BaseModel):
    """The body of `POST /v1/embeddings`. Its fields mean the same as in a chat request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[Any] = Field(description="One conversation with at least one image or clip.")
    encoding_format: Encoding | None = Field(
        default=None, description="float (default), or base64 of little-endian float32."
    )
    input: Any = Field(default=None, description="Has to be absent or empty: only images and clips are embedded.")
    cache_salt: str | None = None
    vision: Vision | None = Field(default=None, description=f"Only {', '.join(VISION_FIELDS)}.")


@dataclass(frozen=True, kw_only=True)
class EmbeddingCall:
    """An embedding request that was checked.

    Attributes:
        request: For the encoder; its media are sources that have not been fetched.
        model: The served name in the request, which the response repeats.
        ignored: Fields that were sent and have no effect here.
    """

    request: Request
    model: str
    encoding: Encoding = "float"
    ignored: tuple[str, ...] = ()


def parse_embedding(body: Any, request_id: str, config: ServeConfig, tenant: str = "") -> EmbeddingCall:
    """The call that `body` describes.

    Args:
        tenant: See `parse_chat`.

    Raises:
        InvalidRequest: Names the field, what was given and what is allowed.
        UnknownModel: No such model is served.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
    fields = {name: value for name, value in cast(JsonObject, body).items() if value is not None}
    encoding = fields.pop("encoding_format", "float")
    if encoding not in get_args(Encoding):
        raise InvalidRequest(f"encoding_format was {shown(encoding)}; it has to be float or base64", "encoding_format")
    if fields.pop("input", None) not in (None, "", [], [""]) or "messages" not in fields:
        message = "images and clips are embedded here, and no text: leave input empty and send messages with media"
        raise InvalidRequest(message, "input" if "messages" in fields else "messages")
    for name in fields:
        if name in ChatBody.model_fields and name not in EmbeddingBody.model_fields:
            message = f"{name} has no effect on an embedding; leave it out"
            raise InvalidRequest(message, name, "unsupported_parameter")
    call = parse_chat(fields, request_id, config, tenant)
    if not call.request.media:
        raise InvalidRequest("an embedding needs an image or a video; send at least one", "messages")
    _check_vision(fields.get("vision") or {}, call.request.vision, default_reducer(config))
    return EmbeddingCall(request=call.request, model=call.model, encoding=encoding, ignored=call.ignored)


def _check_vision(given: JsonObject, options: VisionOptions, default: str) -> None:
    """Refuse options without an effect, and reducers that act in the decoder.

    Args:
        default: The server's reducer.
    """
    for name, value in given.items():
        if name not in VISION_FIELDS and value not in (None, False):
            param = f"vision.{name}"
            raise InvalidRequest(f"{param} has no effect on an embedding; leave it out", param, "unsupported_parameter")
    if options.reducer is None and options.keep_ratio is None:
        return
    spec = reducer_or_default(options.reducer, default, options.keep_ratio)
    if set(INSIDE_DECODER) & set(spec.capabilities.stages):
        message = f"{spec.canonical} acts in the decoder, which an embedding does not use; name another reducer"
        raise InvalidRequest(message, "vision.reducer")


class Embeddings:
    """Answers embedding requests, within the limits of the chat requests."""

    def __init__(self, chat: Chat, runtime: Runtime, config: ServeConfig) -> None:
        self._chat, self._runtime, self._config = chat, runtime, config

    async def answer(self, http: HttpRequest) -> Response:
        """The response. An error is returned as a response too."""
        return await self._chat.respond(http, self._embed)

    async def _embed(self, http: HttpRequest, content: Any, _: AsyncExitStack) -> Response:
        deadline = asyncio.get_running_loop().time() + self._config.request_timeout_s
        call = parse_embedding(content, http.state.request_id, self._config, http.state.tenant)
        async with until(deadline):
            media = await unless_gone(http, self._encode(call.request))
        vector = await asyncio.to_thread(lambda: mean_embedding(media).numpy())
        headers = {"x-mm-ignored-fields": ", ".join(call.ignored)} if call.ignored else {}
        return Response(to_json(_body(call, media, vector)), media_type="application/json", headers=headers)

    async def _encode(self, request: Request) -> EncodedMedia:
        return await self._runtime.collect(await self._chat.encode(request))


def _body(call: EmbeddingCall, media: EncodedMedia, vector: npt.NDArray[np.float32]) -> JsonObject:
    num_kept = sum(item.tokens.num_tokens for item in media.items)
    floats = vector.astype("<f4")
    encoded = base64.b64encode(floats.tobytes()).decode() if call.encoding == "base64" else floats.tolist()
    body: JsonObject = {
        "id": f"embd-{call.request.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": call.model,
        "data": [{"index": 0, "object": "embedding", "embedding": encoded}],
        "usage": {"prompt_tokens": num_kept, "total_tokens": num_kept},
        "vision": {
            "reducer": media.reducer,
            "visual_tokens_in": sum(item.tokens.num_tokens_in for item in media.items),
            "visual_tokens_kept": num_kept,
        },
    }
    if faults := [item.fault for item in media.items if item.fault]:
        body["vision"]["reducer_faults"] = faults
    return body


def add_embeddings(app: FastAPI, embeddings: Embeddings, body: JsonObject) -> None:
    """Add the route.

    Args:
        body: The `requestBody` that the OpenAPI document shows.
    """

    @app.post("/v1/embeddings", openapi_extra={"requestBody": body}, response_class=Response)
    async def create_embedding(http: HttpRequest) -> Response:
        return await embeddings.answer(http)
