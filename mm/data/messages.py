"""OpenAI-style chat messages to `Message`s.

HTTP, Python and batch jobs all read messages here. Media keep their order. Content may be a string or a list of parts.
A part may carry explicit nulls beside its own field, as Arrow clients send them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mm.data.media import Kind, MediaSource
from mm.data.request import ROLES, Detail, MediaPart, Message, TextPart
from mm.errors import InvalidRequest, shown

MEDIA_PARTS: dict[str, Kind] = {"image_url": "image", "video_url": "video"}


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[Message, ...], tuple[MediaSource, ...]]:
    """Messages, and the sources that their media parts index, in order of appearance.

    Raises:
        InvalidRequest: Names the offending field.
    """
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", "messages")
    media: list[MediaSource] = []
    parsed = tuple(_message(message, f"messages[{i}]", media) for i, message in enumerate(messages))
    return parsed, tuple(media)


def _message(message: Mapping[str, object], param: str, media: list[MediaSource]) -> Message:
    role = message.get("role")
    if role not in (*ROLES, "developer"):
        allowed = ", ".join((*ROLES, "developer"))
        raise InvalidRequest(f"the role {shown(role)} is unknown; allowed: {allowed}", f"{param}.role")
    content = message.get("content")
    role = "system" if role == "developer" else role
    if content is None and role == "assistant":
        content = ""
    fields = _fields(message, role, param)
    if isinstance(content, str):
        return Message(role=role, parts=(TextPart(text=content),), fields=fields)
    if not isinstance(content, Sequence) or not content:
        raise InvalidRequest("content has to be a string or a non-empty list of parts", f"{param}.content")
    given = cast(Sequence[object], content)
    parts = tuple(_part(part, f"{param}.content[{i}]", media) for i, part in enumerate(given))
    return Message(role=role, parts=parts, fields=fields)


def _fields(message: Mapping[str, object], role: str, param: str) -> str:
    """What a template may read of the turn beside its content; see `Message.fields`."""
    found: dict[str, Any] = {}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidRequest("tool_calls has to be a list, in an assistant's message", f"{param}.tool_calls")
        given = cast("Sequence[object]", calls)
        found["tool_calls"] = [_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(given)]
    for name in ("tool_call_id",) if role == "tool" else ():
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                raise InvalidRequest(f"{name} was {shown(value)}; it has to be a text", f"{param}.{name}")
            found[name] = value
    return json.dumps(found, ensure_ascii=False) if found else ""


def _call(call: object, param: str) -> dict[str, Any]:
    """An earlier call; its arguments as an object, which is what templates expect, where they are one."""
    given = cast("Mapping[str, Any]", call if isinstance(call, Mapping) else {})
    function = cast("Mapping[str, Any]", found if isinstance(found := given.get("function"), Mapping) else {})
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidRequest("a call needs a function with a name and arguments as JSON text", f"{param}.function")
    try:
        parsed: object = json.loads(arguments or "{}")
    except ValueError:
        parsed = arguments
    shown_arguments = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else arguments
    return {
        "id": str(given.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": shown_arguments},
    }


def _part(part: object, param: str, media: list[MediaSource]) -> TextPart | MediaPart:
    if not isinstance(part, Mapping):
        raise InvalidRequest("a content part has to be an object with a type", param)
    fields = cast(Mapping[str, object], part)
    kind = fields.get("type")
    if kind == "text":
        text = fields.get("text")
        if not isinstance(text, str):
            raise InvalidRequest("a text part needs a string in text", f"{param}.text")
        return TextPart(text=text)
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        media.append(_source(fields.get(kind), MEDIA_PARTS[kind], f"{param}.{kind}"))
        detail, most = _wishes(fields[kind], f"{param}.{kind}")
        return MediaPart(index=len(media) - 1, kind=MEDIA_PARTS[kind], detail=detail, max_visual_tokens=most)
    allowed = ", ".join(("text", *MEDIA_PARTS))
    raise InvalidRequest(
        f"the content type {shown(kind)} is not supported; allowed: {allowed}", f"{param}.type", "unsupported_content"
    )


def _wishes(value: object, param: str) -> tuple[Detail, int | None]:
    """What a media part says of its visual tokens."""
    given = cast(Mapping[str, object], value if isinstance(value, Mapping) else {})
    detail, most = given.get("detail"), given.get("max_visual_tokens")
    details: dict[object, Detail] = {None: "auto", "auto": "auto", "low": "low", "high": "high"}
    if not isinstance(detail, str | None) or detail not in details:
        raise InvalidRequest(f"detail was {shown(detail)}; allowed: low, high, auto", f"{param}.detail")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        what = f"max_visual_tokens was {shown(most)}; it has to be a whole number of at least 1"
        raise InvalidRequest(what, f"{param}.max_visual_tokens")
    return details[detail], most


def _source(value: object, kind: Kind, param: str) -> MediaSource:
    url = cast(Mapping[str, object], value).get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise InvalidRequest(f'needs an object such as {{"url": "data:{kind}/...;base64,..."}}', param)
    return MediaSource(kind=kind, source=url, param=param)
