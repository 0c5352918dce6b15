"""A chat request's JSON to a `ChatCall`: names, types and ranges are checked, messages and options are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import pydantic_core
from pydantic import BaseModel, ValidationError

from mm.config import MediaLimits
from mm.data.media import FrameSampling, MediaSource
from mm.data.messages import parse_messages
from mm.data.request import Message, Request, SpeculationOptions, VisionOptions
from mm.data.sampling_params import SamplingParams
from mm.errors import InvalidRequest, UnknownModel, nearest, shown
from mm.media.hashing import framed_hash
from serve.api.fields import options_of
from serve.api.other_names import template_options, translated
from serve.api.render import JsonObject
from serve.api.schema import HINTS, IGNORED, NEUTRAL, ChatBody, Speculation, StreamOptions, Vision
from serve.api.tools import Tools, parse_tools
from serve.config import ServeConfig

B = TypeVar("B", bound=BaseModel)
MAX_EXACT = 2.0**53
"""Below it every whole number is a float of its own."""


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A chat request that was checked.

    Attributes:
        request: For the engine; its media are sources that have not been fetched.
        model: The served name in the request, which the response repeats.
        ignored: Fields that were sent and have no effect here.
        tools: What the answer may call; None where it may call nothing.
    """

    request: Request
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_timings: bool = False
    return_accepted: bool = False
    ignored: tuple[str, ...] = ()
    tools: Tools | None = None

    @property
    def sources(self) -> tuple[MediaSource, ...]:
        return tuple(item for item in self.request.media if isinstance(item, MediaSource))


def parse_chat(body: Any, request_id: str, config: ServeConfig, tenant: str = "") -> ChatCall:
    """The call that `body` describes.

    Args:
        tenant: Requests of different tenants share nothing that is cached, whatever their salts.

    Raises:
        InvalidRequest: Names the field, what was given and what is allowed.
        UnknownModel: No such model is served.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
    fields = {name: value for name, value in body.items() if value is not None}
    ignored = _check_names(fields)
    chat = _validated(translated({name: value for name, value in fields.items() if name in ChatBody.model_fields}))
    if chat.model not in config.names:
        raise UnknownModel(chat.model, config.names)
    _check_messages(chat.messages)
    messages, media = parse_messages(chat.messages)
    tools, declared = parse_tools(chat.tools, chat.tool_choice)
    messages = _with_context(messages, declared, template_options(chat.chat_template_kwargs))
    sampling = _sampling(chat, tools)
    if sampling.n > config.max_choices:
        raise InvalidRequest(f"n was {sampling.n}; the limit of this server is {config.max_choices}", "n")
    options = chat.stream_options or StreamOptions()
    request = Request(
        request_id=request_id,
        messages=messages,
        media=media,
        sampling=sampling,
        vision=_vision(chat.vision or Vision(), config.model.limits),
        speculation=SpeculationOptions(**_given(chat.speculation or Speculation(), SpeculationOptions)),
        priority=chat.priority or 0,
        cache_salt=_salt(tenant, chat.cache_salt or ""),
    )
    return ChatCall(
        request=request,
        model=chat.model,
        stream=bool(chat.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        return_timings=request.vision.return_timings,
        return_accepted=bool(chat.speculation and chat.speculation.return_accepted),
        ignored=ignored,
        tools=tools,
    )


def _salt(tenant: str, salt: str) -> str:
    """What separates the caches of a tenant's request: the tenant, narrowed by the request's own salt."""
    return framed_hash("cache-salt", "tenant", tenant, "salt", salt) if tenant else salt


def _check_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the ignored fields. Refuses fields that would change the answer."""
    ignored = []
    for name, value in fields.items():
        if name in ChatBody.model_fields:
            continue
        if name in IGNORED:
            ignored.append(name)
        elif name in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                allowed = " or ".join(pydantic_core.to_json(neutral).decode() for neutral in NEUTRAL[name])
                raise InvalidRequest(
                    f"{name} is not supported by this server; {_hint(name)}leave it out or send {allowed}",
                    name,
                    "unsupported_parameter",
                )
        elif name in HINTS:
            what = f"{name} is not supported by this server; {_hint(name)}leave it out"
            raise InvalidRequest(what, name, "unsupported_parameter")
        else:
            known = [*ChatBody.model_fields, *NEUTRAL, *IGNORED]
            raise InvalidRequest(
                f"the field {name[:100]!r} is unknown{nearest(name[:100], known)}", name[:100], "unknown_parameter"
            )
    return tuple(sorted(ignored))


def _hint(name: str) -> str:
    return f"{HINTS[name]}, or " if name in HINTS else ""


def _with_context(
    messages: tuple[Message, ...], tools: Sequence[JsonObject], options: JsonObject
) -> tuple[Message, ...]:
    """The messages, the first of them with what the chat template gets beside them."""
    context = ({"tools": list(tools)} if tools else {}) | ({"options": options} if options else {})
    if not context:
        return messages
    return replace(messages[0], context=json.dumps(context, ensure_ascii=False)), *messages[1:]


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def read_body(model: type[B], body: object) -> B:
    """A body that has a model of its own.

    Raises:
        InvalidRequest: Names the field, what was given and what is allowed.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
    try:
        return model.model_validate({name: whole_numbers(value) for name, value in cast(JsonObject, body).items()})
    except ValidationError as error:
        raise _invalid(error, model) from None


def whole_numbers(value: Any) -> Any:
    """A number that is whole as one: JSON has a single kind, and 1.0 is an integer of JSON Schema. So in lists too."""
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT:
        return int(value)
    if isinstance(value, list):
        return [whole_numbers(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: whole_numbers(item) for name, item in cast(JsonObject, value).items()}
    return value


def _validated(fields: dict[str, Any]) -> ChatBody:
    return read_body(ChatBody, fields)


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first error, in one sentence that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"], first["type"] == "extra_forbidden")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param, "missing_parameter")
    if first["type"] == "extra_forbidden":
        inner = Speculation if first["loc"][0] == "speculation" else Vision
        fields = list((model if len(first["loc"]) == 1 else inner).model_fields)
        hint, allowed = nearest(str(first["loc"][-1]), fields), ", ".join(fields)
        return InvalidRequest(f"{param} is unknown{hint} (allowed: {allowed})", param, "unknown_parameter")
    message = first["msg"].removeprefix("Input ").replace("should", "has to", 1)
    return InvalidRequest(f"{param} {message}; it was {shown(first['input'])}", param, "invalid_value")


def _path(loc: tuple[int | str, ...], whole: bool) -> str:
    """The field's path in the request, without pydantic's names for a union's members."""
    known = Vision.model_fields | StreamOptions.model_fields | Speculation.model_fields
    steps = [step for step in loc[1:] if whole or isinstance(step, int) or step in known]
    return ".".join(str(step)[:100] for step in (loc[0], *steps))


def _check_messages(messages: list[Any]) -> None:
    """Refuse what `parse_messages` does not read although it changes the meaning."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest("a message has to be an object with role and content", f"messages[{i}]")
        for name in ("function_call", "audio"):
            if message.get(name):
                param = f"messages[{i}].{name}"
                raise InvalidRequest(f"{name} is not supported by this server", param, "unsupported_parameter")


def _given(body: BaseModel, options: type) -> dict[str, Any]:
    """The options of a dataclass that a body has values for."""
    names = [one.name for one, _ in options_of(options) if one.name in type(body).model_fields]
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _sampling(chat: ChatBody, tools: Tools | None) -> SamplingParams:
    options = _given(chat, SamplingParams)
    if tools is not None and (form := tools.response_format) is not None:
        if (options.get("response_format") or {}).get("type", "text") != "text":
            raise InvalidRequest("a call that is required cannot have a response_format too", "response_format")
        options["response_format"] = form
    return SamplingParams(max_new_tokens=chat.max_completion_tokens or chat.max_tokens, **options)


def _vision(vision: BaseModel, limits: MediaLimits) -> VisionOptions:
    options = _given(vision, VisionOptions)
    frames = {name: options.pop(name) for name in ("num_frames", "fps") if name in options}
    if len(frames) == 2:
        raise InvalidRequest("give vision.num_frames or vision.fps, not both", "vision.fps")
    if frames.get("num_frames", 1) > limits.max_sampled_frames:
        message = f"vision.num_frames was {frames['num_frames']}; the limit is {limits.max_sampled_frames}"
        raise InvalidRequest(message, "vision.num_frames")
    return VisionOptions(**options, frames=FrameSampling(**frames) if frames else None)
