"""The API as its OpenAPI document shows it: bodies, statuses, content types and the security scheme.

Messages are read by `mm.data.messages`, which Python callers and jobs use too. Their form is written down once more
here, for people and for tools that read the document; a test compares the two.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from serve.api.completions import NOT_TAKEN as NOT_IN_COMPLETIONS
from serve.api.document_limits import state_limits
from serve.api.embeddings import VISION_FIELDS, EmbeddingBody
from serve.api.guard import OPEN_PATHS
from serve.api.render import JsonObject
from serve.api.schema import (
    BODY_RULES,
    IGNORED,
    MEDIA_URL,
    NEUTRAL,
    TOKEN_ID,
    TOOLS,
    VISION,
    ChatBody,
    Salt,
    StreamOptions,
    sampling_fields,
    vision_fields,
)
from serve.api.tokenizing import TokenizeBody
from serve.config import ServeConfig
from serve.runtime import ModelInfo

REFERENCES = "#/components/schemas/{model}"


class _Part(BaseModel):
    """A part of a message. Other fields are ignored: some clients send them as null."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextContent(_Part):
    type: Literal["text"]
    text: str


Address = Annotated[str, Field(min_length=1, json_schema_extra={"format": MEDIA_URL})]


class MediaUrl(_Part):
    url: Annotated[str, Field(min_length=1)] = Field(
        description="A data: URL, or an address the operator allows.", json_schema_extra={"format": MEDIA_URL}
    )
    detail: Literal["low", "high", "auto"] | None = Field(
        default=None, description="low: at most a quarter of the visual tokens of high, and at most a fixed number."
    )
    max_visual_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="At most so many of the item's visual tokens enter the decoder."
    )


class ImageContent(_Part):
    type: Literal["image_url"]
    image_url: MediaUrl | Address


class VideoContent(_Part):
    type: Literal["video_url"]
    video_url: MediaUrl | Address


Content = Annotated[TextContent | ImageContent | VideoContent, Field(discriminator="type")]
Contents = str | Annotated[list[Content], Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class InputMessage(_Message):
    """A turn of the user, an instruction, or a tool's answer."""

    role: Literal["system", "developer", "user", "tool"]
    content: Contents


class CalledFunction(_Message):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(_Message):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(_Message):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Contents | None = None
    tool_calls: list[ToolCall] | None = None


Messages = Annotated[list[Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]], Field(min_length=1)]


class ChatRequest(ChatBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages  # type: ignore[assignment]


Token = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": TOKEN_ID})]
Tokens = Annotated[list[Token], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class _Completion(BaseModel):
    """What comes first in a completion."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class EmbeddingVision(create_model("EmbeddedVision", __config__=VISION, **vision_fields(*VISION_FIELDS))):
    """The `vision` object of an embedding."""


HAS_MEDIA = {
    "contains": {
        "required": ["content"],
        "properties": {
            "content": {
                "type": "array",
                "contains": {"required": ["type"], "properties": {"type": {"enum": ["image_url", "video_url"]}}},
            }
        },
    }
}


class EmbeddingRequest(EmbeddingBody):
    """The body of `POST /v1/embeddings`."""

    messages: Annotated[Messages, Field(json_schema_extra=HAS_MEDIA)]  # type: ignore[assignment]
    cache_salt: Salt | None = None  # type: ignore[assignment]
    vision: EmbeddingVision | None = None  # type: ignore[assignment]


TEXT_FIELDS = {name: value for name, value in sampling_fields().items() if name not in NOT_IN_COMPLETIONS}


class CompletionRequest(create_model("SampledText", __base__=_Completion, **TEXT_FIELDS)):
    """The body of `POST /v1/completions`."""

    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None  # type: ignore[assignment]


class TextMessage(_Message):
    """A turn without media."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextContent], Field(min_length=1)]


class TokenizeRequest(TokenizeBody):
    """The body of `POST /tokenize`."""

    messages: Annotated[list[TextMessage], Field(min_length=1)] | None = None  # type: ignore[assignment]
    tools: Annotated[list[Any], WithJsonSchema(TOOLS)] | None = None
    add_special_tokens: Literal[True] | None = None  # type: ignore[assignment]
    add_generation_prompt: Literal[True] | None = None  # type: ignore[assignment]


class LoadRequest(BaseModel):
    """The body of `POST /load_model`."""

    model: str


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorObject(BaseModel):
    """Every error, in OpenAI's form."""

    error: ErrorFields


def body_of(model: type[BaseModel]) -> JsonObject:
    """The `requestBody` of a route."""
    schema = model.model_json_schema(ref_template=REFERENCES)
    schema.pop("$defs", None)
    if issubclass(model, ChatBody | _Completion):
        close(schema)
    if issubclass(model, ChatBody):
        schema["allOf"] = BODY_RULES
    if "input" in schema["properties"]:
        schema["properties"]["input"] = {"enum": [None, "", [], [""]]}
    if model is TokenizeRequest:
        schema["oneOf"] = [
            {"required": [given], "properties": {given: {"not": {"type": "null"}}, other: {"type": "null"}}}
            for given, other in (("prompt", "messages"), ("messages", "prompt"))
        ]
    return {"content": {"application/json": {"schema": schema}}, "required": True}


def close(schema: JsonObject) -> None:
    """Name the fields that are accepted beside those that are carried out, and say that there are no others."""
    ignored = {name: {"description": "Accepted, without an effect."} for name in sorted(IGNORED)}
    neutral = {name: {"enum": [*values, None]} for name, values in sorted(NEUTRAL.items())}
    schema["properties"] = {**ignored, **neutral, **schema["properties"]}
    schema["additionalProperties"] = False


def definitions() -> JsonObject:
    """The parts that the bodies refer to."""
    found: JsonObject = {}
    for model in (ChatRequest, EmbeddingRequest, CompletionRequest, TokenizeRequest):
        found |= model.model_json_schema(ref_template=REFERENCES).get("$defs", {})
    error = ErrorObject.model_json_schema(ref_template=REFERENCES)
    return found | error.pop("$defs") | {"ErrorObject": error}


ERRORS = {
    400: "The request cannot be carried out as it is.",
    401: "The API key is missing or wrong.",
    403: "The host or the web page may not use this server.",
    404: "There is no such model or path.",
    405: "The path does not take this method.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    429: "There is no room now; see Retry-After.",
    500: "A fault of the server.",
    503: "A part of the server is not running; see Retry-After.",
    504: "The request took longer than it may.",
}
ALWAYS = (403, 500)
"""Every route may answer with these."""
WITH_BODY = (400, 404, 408, 413, 429, 503, 504)
"""Routes that read a body may also answer with these."""
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def complete_document(document: JsonObject, config: ServeConfig, info: ModelInfo) -> None:
    """Add what FastAPI does not know: statuses, content types, the security scheme, and this server's limits."""
    names, has_keys = config.names, bool(config.api_keys)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions())
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete_operation(operation, path, method, has_keys=has_keys)
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            model = schema.get("properties", {}).get("model")
            if model is not None:
                model["enum"] = [*names, None] if "anyOf" in model else list(names)
    state_limits(document, config, info)


def _complete_operation(operation: JsonObject, path: str, method: str, *, has_keys: bool) -> None:
    is_open = path in OPEN_PATHS
    statuses = [*ALWAYS, *(WITH_BODY if method == "post" else ()), *([401] if has_keys and not is_open else [])]
    if "{" in path:
        statuses += [404]
    responses = operation["responses"]
    responses.pop("422", None)
    content = {"application/json": {"schema": {"$ref": REFERENCES.format(model="ErrorObject")}}}
    responses.update({str(status): {"description": ERRORS[status], "content": content} for status in sorted(statuses)})
    responses["200"] = {"description": "Successful Response", "content": _content(path)}
    if path == "/health":
        responses["503"] = {"description": ERRORS[503], "content": {"application/json": {}}}
    if is_open:
        operation["security"] = []


def _content(path: str) -> JsonObject:
    if path == "/metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    if path == "/load_model":
        return {"text/event-stream": {"schema": {"type": "string"}}}
    plain: JsonObject = {"application/json": {"schema": {"type": "object"}}}
    return plain | ({"text/event-stream": {"schema": {"type": "string"}}} if path in STREAMED else {})
