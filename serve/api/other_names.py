"""Fields of vLLM's API that say in other words what this API says: they become the fields that are carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from mm.errors import InvalidRequest, shown
from serve.api.render import JsonObject

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template"})
"""Variables of a chat template that a request cannot set by `chat_template_kwargs`."""
FRAMES = ("num_frames", "fps")
MAX_OPTIONS = 32


def translated(fields: Mapping[str, Any]) -> JsonObject:
    """The fields of a request's body with `guided_json`, `structured_outputs` and `mm_processor_kwargs` put in ours.

    Raises:
        InvalidRequest: One of them asks for what is not known, or what another field asks for too.
    """
    found = dict(fields)
    schema = _schema(found.pop("guided_json", None), found.pop("structured_outputs", None))
    if schema is not None:
        if "response_format" in found:
            raise InvalidRequest("give response_format or structured_outputs, not both", "response_format")
        found["response_format"] = schema
    if (options := found.pop("mm_processor_kwargs", None)) is not None:
        found["vision"] = _with_frames(options, found.get("vision"))
    return found


def _schema(guided: object, structured: object) -> JsonObject | None:
    """A `response_format` for the two fields."""
    param = "guided_json" if guided is not None else "structured_outputs"
    if guided is None and structured is None:
        return None
    if guided is None:
        given = cast(JsonObject, structured) if isinstance(structured, dict) else {}
        asked = {name: value for name, value in given.items() if value is not None}
        if asked == {"json_object": True}:
            return {"type": "json_object"}
        if asked.keys() != {"json"}:
            what = f"structured_outputs was {shown(structured)}; give json, a JSON schema, or json_object, true"
            raise InvalidRequest(what, param, "unsupported_parameter")
        guided = asked["json"]
    if isinstance(guided, str):
        try:
            guided = json.loads(guided)
        except ValueError:
            guided = None
    if not isinstance(guided, dict):
        raise InvalidRequest(f"{param} has to hold a JSON schema object", param)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": guided}}


def _with_frames(options: object, vision: object) -> object:
    """The `vision` object with the frames that `mm_processor_kwargs` asks for."""
    param = "mm_processor_kwargs"
    if not isinstance(options, dict) or not isinstance(vision, dict | None):
        raise InvalidRequest(f"{param} was {shown(options)}; it has to be an object", param)
    given = {name: value for name, value in cast(JsonObject, options).items() if value is not None}
    if unknown := next((name for name in given if name not in FRAMES), None):
        what = f"{param}.{unknown[:100]} is not known here; allowed: num_frames, fps. vision.max_visual_tokens and "
        what += "the detail of an image say how many visual tokens it may have"
        raise InvalidRequest(what, f"{param}.{unknown[:100]}", "unsupported_parameter")
    own = {name: value for name, value in cast(JsonObject, vision or {}).items() if value is not None}
    for name in given:
        if name in own and own[name] != given[name]:
            raise InvalidRequest(f"vision.{name} and {param}.{name} differ; give one of them", f"{param}.{name}")
    return {**given, **own} if given or vision is not None else None


def template_options(given: Mapping[str, Any] | None) -> JsonObject:
    """The variables that `chat_template_kwargs` sets.

    Raises:
        InvalidRequest: One of them is not the request's to set.
    """
    param = "chat_template_kwargs"
    options = dict(given or {})
    if len(options) > MAX_OPTIONS:
        raise InvalidRequest(f"{param} has {len(options)} entries; the limit is {MAX_OPTIONS}", param)
    for name in options:
        if name in RESERVED or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(f"{param} cannot set {shown(name)}; leave it out", param)
    return options
