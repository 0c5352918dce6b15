"""The HTTP application: OpenAI-compatible chat, embeddings, models, health and metrics over any runtime."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mm.errors import InvalidRequest, MmError, UnknownModel
from mm.models.shipped import limits_of
from serve.api.batches.routes import add_batches, batches_of
from serve.api.body import BodyReader
from serve.api.chat import Chat, http_response
from serve.api.counting import Counting, add_counting
from serve.api.document import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadRequest,
    TokenizeRequest,
    body_of,
    complete_document,
)
from serve.api.embeddings import Embeddings, add_embeddings
from serve.api.errors import error_response
from serve.api.formats import COMPLETIONS, RESPONSES
from serve.api.guard import Guard
from serve.api.home import add_home
from serve.api.hosts import HostPolicy
from serve.api.leftovers import DropLeftovers
from serve.api.limits import add_limits
from serve.api.metrics import CONTENT_TYPE, Metrics
from serve.api.render import JsonObject, to_json
from serve.api.responses_body import responses_body
from serve.api.stream import frame
from serve.api.tokenizing import DetokenizeBody, Tokenizing, add_tokenizing
from serve.config import ServeConfig
from serve.runtime import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")

HEALTH_TIMEOUT_S = 0.9
"""Whoever asks for `/health` decides within a second."""


def create_app(runtime: Runtime, config: ServeConfig, *, echo_request_id: bool = True) -> FastAPI:
    """The application over a runtime, which has the model loaded.

    Args:
        echo_request_id: See `Guard`.
    """
    # The interactive pages would load scripts from elsewhere, so only the schema is served.
    batches = batches_of(config, lambda inner: create_app(runtime, inner))
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None, "redirect_slashes": False}
    app = FastAPI(title="mm", version=_version(), lifespan=batches and batches.lifespan, **options)
    hosts = HostPolicy(config.host, config.allowed_hosts, config.allowed_origins)
    app.add_middleware(Guard, hosts=hosts, api_keys=config.api_keys, echo_request_id=echo_request_id)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.rstrip("/") for origin in config.allowed_origins],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Mm-Ignored-Fields", "X-Request-Id"],
        )
    app.add_middleware(DropLeftovers)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(MmError, _on_error)
    metrics = Metrics(config.names[0])
    app.state.metrics = metrics
    bodies = BodyReader(config)
    chat = Chat(runtime, config, metrics, bodies)
    app.state.room = chat.room
    _add_chat(app, chat)
    _add_document(app, runtime, config)
    add_counting(app, Counting(chat, runtime, config), body_of(ChatRequest))
    tokens = (body_of(TokenizeRequest), body_of(DetokenizeBody))
    add_tokenizing(app, Tokenizing(chat, runtime, config), tokens)
    add_embeddings(app, Embeddings(chat, runtime, config), body_of(EmbeddingRequest))
    _add_models(app, runtime, config, bodies)
    _add_operations(app, runtime, metrics)
    add_limits(app, runtime, config)
    add_batches(app, batches, bodies)
    add_home(app, config)
    return app


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    return http_response(error_response(error, http.state.request_id))


async def _on_invalid(http: HttpRequest, error: Exception) -> Response:
    return http_response(error_response(InvalidRequest("the request's address or parameters are malformed")))


def _add_chat(app: FastAPI, chat: Chat) -> None:
    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body_of(ChatRequest)}, response_class=Response)
    async def chat_completions(http: HttpRequest) -> Response:
        return await chat.answer(http)

    @app.post("/v1/responses", openapi_extra={"requestBody": responses_body()}, response_class=Response)
    async def responses(http: HttpRequest) -> Response:
        return await chat.answer(http, RESPONSES)

    @app.post("/v1/completions", openapi_extra={"requestBody": body_of(CompletionRequest)}, response_class=Response)
    async def completions(http: HttpRequest) -> Response:
        return await chat.answer(http, COMPLETIONS)


def _add_document(app: FastAPI, runtime: Runtime, config: ServeConfig) -> None:
    """`GET /openapi.json`, which states the limits of this server."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JsonObject:
        info = await runtime.info()
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            complete_document(app.openapi_schema, config, info)
        return app.openapi_schema


def _add_models(app: FastAPI, runtime: Runtime, config: ServeConfig, bodies: BodyReader) -> None:
    created = int(time.time())

    async def card(name: str) -> JsonObject:
        info = await runtime.info()
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "mm",
            "root": config.names[0],
            "parent": None,
            "max_model_len": info.max_context_tokens,
            "input_modalities": ["text", *info.kinds],
            "default_reducer": info.default_reducer,
            "default_drafter": config.model.speculation.drafter,
            "drafters": list(config.model.speculation.offered),
            "description": limits_of(config.model.model),
            **({"self_test": "skipped"} if config.model.skip_self_test else {}),
        }

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [await card(name) for name in config.names]
        return Response(to_json({"object": "list", "data": cards}), media_type="application/json")

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model not in config.names:
            raise UnknownModel(model, config.names)
        return Response(to_json(await card(model)), media_type="application/json")

    @app.post("/load_model", openapi_extra={"requestBody": body_of(LoadRequest)})
    async def load_model(http: HttpRequest) -> Response:
        """Terminal chat clients call this first; the model is loaded already."""
        body = await bodies.read_json(http)
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str):
            raise InvalidRequest("model is missing", "model", "missing_parameter")
        if name.removesuffix("@main") not in config.names:
            raise UnknownModel(name, config.names)
        return Response(frame({"status": "ready", "model": name, "cached": True}), media_type="text/event-stream")


def _add_operations(app: FastAPI, runtime: Runtime, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        asked = asyncio.gather(runtime.health(), runtime.status())
        answer = await _or_none(asyncio.wait_for(asked, HEALTH_TIMEOUT_S))
        is_ok = answer is not None and answer[0].is_ok and not answer[1].problems
        content: JsonObject = {"status": "ok" if is_ok else "unavailable"}
        if answer is not None:
            stages, status = answer
            found = {name: list(names) for name, names in asdict(stages).items()}
            found |= {"problems": list(status.problems), "plugins_off": [asdict(one) for one in status.plugins_off]}
            content |= {name: value for name, value in found.items() if value}
        return Response(to_json(content), 200 if is_ok else 503, media_type="application/json")

    @app.get("/ping")
    async def ping() -> Response:
        return Response(b"{}", media_type="application/json")

    @app.get("/version")
    async def version_() -> Response:
        return Response(to_json({"version": _version()}), media_type="application/json")

    @app.get("/metrics")
    async def metrics_() -> Response:
        load, status = await _or_none(runtime.load()), await _or_none(runtime.status())
        return Response(metrics.exposition(load, status), headers={"content-type": CONTENT_TYPE})


async def _or_none(call: Awaitable[T]) -> T | None:
    """The result of a call to the runtime; None, and a line in the log, if it fails."""
    try:
        return await call
    except Exception as error:
        log.warning("the runtime did not answer: error=%s", type(error).__name__)
        return None


def _version() -> str:
    try:
        return version("mm-serving")
    except PackageNotFoundError:
        return "0"
