"""The bodies of the API as its OpenAPI document shows them.

Messages are read by `mm.data.messages`, which Python callers and jobs use too. Their form is written down once more
here, for people and for tools that read the document; a test compares the two.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.api.embeddings import EmbeddingBody
from serve.api.schema import ChatBody

REFERENCES = "#/components/schemas/{model}"


class _Part(BaseModel):
    """A part of a message. Other fields are ignored: some clients send them as null."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextContent(_Part):
    type: Literal["text"]
    text: str


class MediaUrl(_Part):
    url: Annotated[str, Field(min_length=1)] = Field(description="A data: URL, or an address the operator allows.")
    detail: Literal["low", "high", "auto"] | None = Field(
        default=None, description="low: at most a quarter of the visual tokens of high, and at most a fixed number."
    )
    max_visual_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="At most so many of the item's visual tokens enter the decoder."
    )


class ImageContent(_Part):
    type: Literal["image_url"]
    image_url: MediaUrl | Annotated[str, Field(min_length=1)]


class VideoContent(_Part):
    type: Literal["video_url"]
    video_url: MediaUrl | Annotated[str, Field(min_length=1)]


Content = Annotated[TextContent | ImageContent | VideoContent, Field(discriminator="type")]
Contents = str | Annotated[list[Content], Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class InputMessage(_Message):
    """A turn of the user, an instruction, or a tool's answer."""

    role: Literal["system", "developer", "user", "tool"]
    content: Contents


class AssistantMessage(_Message):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Contents | None = None


Messages = Annotated[list[Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]], Field(min_length=1)]


class ChatRequest(ChatBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages  # type: ignore[assignment]


class EmbeddingRequest(EmbeddingBody):
    """The body of `POST /v1/embeddings`."""

    messages: Messages  # type: ignore[assignment]


class LoadRequest(BaseModel):
    """The body of `POST /load_model`."""

    model: str


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The `requestBody` of a route."""
    schema = model.model_json_schema(ref_template=REFERENCES)
    schema.pop("$defs", None)
    return {"content": {"application/json": {"schema": schema}}, "required": True}


def definitions() -> dict[str, Any]:
    """The parts that the bodies refer to."""
    found: dict[str, Any] = {}
    for model in (ChatRequest, EmbeddingRequest):
        found |= model.model_json_schema(ref_template=REFERENCES).get("$defs", {})
    return found
