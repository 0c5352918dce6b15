"""The body of `POST /v1/responses` (OpenAI's Responses API), translated to the body of a chat request.

`serve.api.parse` then checks the chat body, so that every field means the same in both forms and the same errors come
out. Nothing is stored on the server: a field that needs a stored response is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mm.errors import InvalidRequest, nearest
from serve.api.render import JsonObject
from serve.api.schema import IGNORED, LOGPROBS_RULE, MEDIA_URL, SCHEMA_FIELDS, ChatBody, closed

ROLES = ("user", "assistant", "system", "developer")
RENAMED = {"max_output_tokens": "max_completion_tokens"}
NOT_TRANSLATED = frozenset(
    {
        *("messages", "max_tokens", "max_completion_tokens", "response_format", "stream_options", "n", "tools"),
        *("tool_choice", "guided_json", "structured_outputs"),
    }
)
"""Fields of a chat body that have another name or form here, or none."""
PASSED = (frozenset(ChatBody.model_fields) | IGNORED) - NOT_TRANSLATED
"""Fields that mean the same in a chat request. Those without an effect are named in the response's header there."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "reasoning": ({}, {"effort": None, "summary": None}),
    "stream_options": ({}, {"include_obfuscation": False}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
"""Fields that are not implemented, with the values at which that makes no difference."""
FORMATS = (
    closed("type", type={"enum": ["text", "json_object"]}),
    closed("type", "name", "schema", type={"const": "json_schema"}, **SCHEMA_FIELDS),
)
TEXT_NEUTRAL = (("verbosity", "medium"),)
"""Fields of `text` beside its format, at values that make no difference."""
NEEDS_STORE = frozenset({"previous_response_id", "conversation", "prompt"})


def responses_body() -> JsonObject:
    """The body of the request for the OpenAPI document: names and types of what this file reads."""
    text: JsonObject = {"type": "string"}
    address = {"type": "string", "format": MEDIA_URL}
    detail = {"enum": ["low", "high", "auto"]}
    parts = [_object("type", "text", type={"const": kind}, text=text) for kind in ("input_text", "output_text")] + [
        _object("type", f"{kind}_url", type={"const": f"input_{kind}"}, detail=detail, **{f"{kind}_url": address})
        for kind in ("image", "video")
    ]
    content = {"anyOf": [text, {"type": "array", "items": {"anyOf": parts}, "minItems": 1}]}
    message = _object("role", "content", type={"const": "message"}, role={"enum": list(ROLES)}, content=content)
    chat = ChatBody.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    properties: JsonObject = {
        **{name: {"description": "Accepted, without an effect."} for name in sorted(IGNORED)},
        **{name: {"enum": [*values, None]} for name, values in NEUTRAL.items()},
        **{name: chat[name] for name in sorted(PASSED - IGNORED) if name in chat},
        "input": {"anyOf": [text, {"type": "array", "items": message, "minItems": 1}]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        "metadata": {"type": ["object", "null"]},
        "text": {
            "anyOf": [
                closed(format={"anyOf": [*FORMATS, {"type": "null"}]}, verbosity={"enum": ["medium", None]}),
                {"type": "null"},
            ]
        },
    }
    required = ["model", "input"]
    schema = closed(*required, **properties) | {"allOf": [LOGPROBS_RULE]}
    return {"content": {"application/json": {"schema": schema}}, "required": True}


def _object(*required: str, **properties: JsonObject) -> JsonObject:
    return {"type": "object", "required": list(required), "properties": properties}


def to_chat(body: Any) -> JsonObject:
    """The body of the chat request that a response request stands for.

    Raises:
        InvalidRequest: Names the field, what was given and what is allowed.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
    fields = {name: value for name, value in cast(JsonObject, body).items() if value is not None}
    _check_names(fields)
    if "input" not in fields:
        raise InvalidRequest("input is missing; send a text or a list of messages", "input", "missing_parameter")
    messages = _messages(fields["input"])
    if "instructions" in fields:
        if not isinstance(fields["instructions"], str):
            raise InvalidRequest("instructions has to be a text", "instructions")
        messages.insert(0, {"role": "system", "content": fields["instructions"]})
    chat = {RENAMED.get(name, name): value for name, value in fields.items() if name in PASSED or name in RENAMED}
    return chat | {"messages": messages} | _form(fields.get("text"))


def _check_names(fields: Mapping[str, Any]) -> None:
    """Refuse fields that would change the answer and have no effect here."""
    known = PASSED | set(RENAMED) | set(NEUTRAL) | {"input", "instructions", "text"}
    for name, value in fields.items():
        if name in NEEDS_STORE:
            message = f"{name} needs responses that were stored, and this server stores none; send the whole input"
            raise InvalidRequest(message, name, "unsupported_parameter")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            allowed = " or ".join(str(one) for one in NEUTRAL[name])
            message = f"{name} is not supported by this server; leave it out or send {allowed}"
            raise InvalidRequest(message, name, "unsupported_parameter")
        if name not in known:
            message = f"the field {name[:100]!r} is unknown{nearest(name[:100], sorted(known))}"
            raise InvalidRequest(message, name[:100], "unknown_parameter")


def _messages(given: Any) -> list[JsonObject]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input has to be a text or a list of messages that is not empty", "input")
    return [_message(item, f"input[{i}]") for i, item in enumerate(cast(list[object], given))]


def _message(item: object, param: str) -> JsonObject:
    if not isinstance(item, dict):
        raise InvalidRequest("an item of the input has to be an object with role and content", param)
    fields = cast(JsonObject, item)
    kind, role = fields.get("type", "message"), fields.get("role")
    if kind != "message":
        message = f"the item type {_short(kind)} is not supported; allowed: message"
        raise InvalidRequest(message, f"{param}.type", "unsupported_content")
    if role not in ROLES:
        raise InvalidRequest(f"the role {_short(role)} is unknown; allowed: {', '.join(ROLES)}", f"{param}.role")
    content = fields.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise InvalidRequest("content has to be a text or a list of parts that is not empty", f"{param}.content")
    parts = [_part(part, f"{param}.content[{i}]") for i, part in enumerate(cast(list[object], content))]
    return {"role": role, "content": parts}


def _part(part: object, param: str) -> JsonObject:
    if not isinstance(part, dict):
        raise InvalidRequest("a content part has to be an object with a type", param)
    fields = cast(JsonObject, part)
    kind = fields.get("type")
    if kind in ("input_text", "output_text"):
        if not isinstance(fields.get("text"), str):
            raise InvalidRequest(f"a part of type {kind} needs a string in text", f"{param}.text")
        return {"type": "text", "text": fields["text"]}
    if kind in ("input_image", "input_video"):
        name = f"{str(kind).removeprefix('input_')}_url"
        if not isinstance(fields.get(name), str):
            message = f"a part of type {kind} needs an address or data: URL in {name}; files by id are not supported"
            raise InvalidRequest(message, f"{param}.{name}")
        detail = {"detail": fields["detail"]} if fields.get("detail") is not None else {}
        return {"type": name, name: {"url": fields[name], **detail}}
    allowed = "input_text, input_image, input_video, output_text"
    raise InvalidRequest(
        f"the content type {_short(kind)} is not supported; allowed: {allowed}", f"{param}.type", "unsupported_content"
    )


def _form(text: object) -> JsonObject:
    """The chat field `response_format` for the field `text`."""
    if text is None:
        return {}
    if not isinstance(text, dict):
        raise InvalidRequest("text has to be an object with a format", "text")
    fields = cast(JsonObject, text)
    for name, value in fields.items():
        if name != "format" and (name, value) not in TEXT_NEUTRAL and value is not None:
            message = f"text.{name[:100]} is not supported by this server; leave it out{_neutral(name)}"
            raise InvalidRequest(message, f"text.{name[:100]}", "unsupported_parameter")
    form = fields.get("format")
    if form is None:
        return {}
    if not isinstance(form, dict):
        raise InvalidRequest("text.format has to be an object with a type", "text.format")
    given = cast(JsonObject, form)
    if given.get("type") != "json_schema":
        return {"response_format": given}
    schema = {name: value for name, value in given.items() if name != "type" and value is not None}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _neutral(name: str) -> str:
    allowed = [value for known, value in TEXT_NEUTRAL if known == name]
    return f" or send {allowed[0]}" if allowed else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
