"""What a chat request may look like, and what it means: JSON to `Request`.

Three kinds of fields beside those we carry out: some cannot change the answer and are ignored, some are accepted only
at the value that changes nothing, and the rest is refused by name. Nothing that changes the answer is ever ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from mm.config import MediaLimits
from mm.data.media import FrameSampling, MediaSource
from mm.data.messages import parse_messages
from mm.data.request import Request, SpeculationOptions, VisionOptions
from mm.data.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from mm.errors import InvalidRequest, UnknownModel, nearest
from serve.config import ServeConfig

INT64 = 2**63
INT32 = 2**31
MAX_SALT_CHARACTERS = 256

IGNORED = frozenset(
    {
        "generation_config",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's clients, and of terminal chat clients, that say nothing about the answer's text."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Fields that are not implemented, with the values at which that makes no difference."""


Stop = Annotated[
    list[str],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}),
]
Bias = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]
Form = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "json_schema": {
                    "type": "object",
                    "required": ["name", "schema"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                        "description": {"type": "string"},
                        "schema": {"type": "object"},
                        "strict": {"type": "boolean"},
                    },
                },
            },
        }
    ),
]
"""What is in it is checked by `SamplingParams`, for Python callers too."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Vision(BaseModel):
    """The `vision` object: what to do with visual tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reducer: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        default=None, description='Such as "divprune:keep_ratio=0.25"; the server\'s default if absent.'
    )
    keep_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="Tokens kept / tokens in.")
    positions: Literal["kept", "compact"] | None = Field(
        default=None, description="Whether rows are counted anew behind dropped ones; the reducer's choice if absent."
    )
    return_map: bool | None = Field(default=None, description="Say which tokens were kept.")
    return_timings: bool | None = Field(default=None, description="Say how many seconds each stage took.")
    num_frames: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Frames taken of a clip, evenly spread."
    )
    fps: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Frames per second taken of a clip."
    )


class Speculation(BaseModel):
    """The `speculation` object: what is drafted ahead of the decoder. Changes how fast an answer comes, not what."""

    model_config = ConfigDict(extra="forbid", strict=True)

    drafter: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        default=None, description='One that the server allows, such as "copy", or "none"; its default if absent.'
    )
    max_draft_tokens: Annotated[int, Field(ge=0, le=255)] | None = Field(
        default=None, description="Drafted tokens per pass, up to the server's limit; 0 drafts nothing."
    )
    return_accepted: bool | None = Field(default=None, description="Say which text was drafted and accepted.")


class ChatBody(BaseModel):
    """The body of `POST /v1/chat/completions`, as far as it is carried out."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="Takes precedence over max_tokens."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(default=None, description="0 or -1 is all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        default=None, description="Over the prompt's text and the answer; 1 is none."
    )
    logit_bias: Bias | None = Field(default=None, description="Token id to what is added to its logit.")
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = Field(
        default=None, description="Of the model's own law, before temperature, penalties and truncation."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: Form | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(gt=-INT32, lt=INT32)] | None = Field(
        default=None, description="Lower is served first; 0 if absent. Who waits too long goes before all."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = Field(
        default=None, description="Requests with different salts share nothing that is cached."
    )
    vision: Vision | None = None
    speculation: Speculation | None = None


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A chat request, understood.

    Attributes:
        request: What the engine gets; its media are sources still to be fetched.
        model: The served name that was asked for, and is answered with.
        ignored: Fields that were sent and mean nothing here.
    """

    request: Request
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_timings: bool = False
    return_accepted: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[MediaSource, ...]:
        return tuple(item for item in self.request.media if isinstance(item, MediaSource))


def parse_json(body: bytes | bytearray) -> Any:
    """JSON as the standard has it: UTF-8, no NaN, no lone surrogates, not too deep.

    Raises:
        InvalidRequest: `invalid_json`.
    """
    try:
        return pydantic_core.from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise InvalidRequest(f"the body is not valid JSON: {reason}", None, "invalid_json") from None


def parse_chat(body: Any, request_id: str, config: ServeConfig) -> ChatCall:
    """The call that `body` describes.

    Raises:
        InvalidRequest: Names the field, what was given and what is allowed.
        UnknownModel: No such model is served.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("the body has to be a JSON object", None, "invalid_json")
    fields = {name: value for name, value in body.items() if value is not None}
    ignored = _check_names(fields)
    chat = _validated({name: value for name, value in fields.items() if name in ChatBody.model_fields})
    if chat.model not in config.names:
        raise UnknownModel(chat.model, config.names)
    if (chat.n or 1) > config.max_choices:
        raise InvalidRequest(f"n was {chat.n}; the limit of this server is {config.max_choices}", "n")
    _check_messages(chat.messages)
    messages, media = parse_messages(chat.messages)
    options = chat.stream_options or StreamOptions()
    request = Request(
        request_id=request_id,
        messages=messages,
        media=media,
        sampling=_sampling(chat),
        vision=_vision(chat.vision or Vision(), config.model.limits),
        speculation=_speculation(chat.speculation or Speculation()),
        priority=chat.priority or 0,
        cache_salt=chat.cache_salt or "",
    )
    return ChatCall(
        request=request,
        model=chat.model,
        stream=bool(chat.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        return_timings=bool(chat.vision and chat.vision.return_timings),
        return_accepted=bool(chat.speculation and chat.speculation.return_accepted),
        ignored=ignored,
    )


def _check_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The ignored fields; refuses those that would change the answer."""
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
                    f"{name} is not supported by this server; leave it out or send {allowed}",
                    name,
                    "unsupported_parameter",
                )
        else:
            known = [*ChatBody.model_fields, *NEUTRAL, *IGNORED]
            raise InvalidRequest(
                f"the field {name[:100]!r} is unknown{nearest(name[:100], known)}", name[:100], "unknown_parameter"
            )
    return tuple(sorted(ignored))


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _validated(fields: dict[str, Any]) -> ChatBody:
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first complaint, in one sentence that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"], first["type"] == "extra_forbidden")
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is missing", param, "missing_parameter")
    if first["type"] == "extra_forbidden":
        fields = list((Speculation if first["loc"][0] == "speculation" else Vision).model_fields)
        hint, allowed = nearest(str(first["loc"][-1]), fields), ", ".join(fields)
        return InvalidRequest(f"{param} is unknown{hint} (allowed: {allowed})", param, "unknown_parameter")
    message = first["msg"].removeprefix("Input ").replace("should", "has to", 1)
    return InvalidRequest(f"{param} {message}; it was {_shown(first['input'])}", param, "invalid_value")


def _path(loc: tuple[int | str, ...], whole: bool) -> str:
    """The field's path in the request, without pydantic's names for a union's members."""
    known = Vision.model_fields | StreamOptions.model_fields | Speculation.model_fields
    steps = [step for step in loc[1:] if whole or isinstance(step, int) or step in known]
    return ".".join(str(step)[:100] for step in (loc[0], *steps))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_messages(messages: list[Any]) -> None:
    """What `parse_messages` would pass over although it changes the meaning."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest("a message has to be an object with role and content", f"messages[{i}]")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                param = f"messages[{i}].{name}"
                raise InvalidRequest(f"{name} is not supported by this server", param, "unsupported_parameter")


SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "n",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "response_format",
)
"""Fields of the body that `SamplingParams` calls the same."""


def _sampling(chat: ChatBody) -> SamplingParams:
    given = {name: value for name in SAME_NAME if (value := getattr(chat, name)) is not None}
    return SamplingParams(max_new_tokens=chat.max_completion_tokens or chat.max_tokens, **given)


def _vision(vision: Vision, limits: MediaLimits) -> VisionOptions:
    if vision.num_frames is not None and vision.fps is not None:
        raise InvalidRequest("give vision.num_frames or vision.fps, not both", "vision.fps")
    if (vision.num_frames or 1) > limits.max_sampled_frames:
        message = f"vision.num_frames was {vision.num_frames}; the limit is {limits.max_sampled_frames}"
        raise InvalidRequest(message, "vision.num_frames")
    frames = None
    if vision.fps is not None:
        frames = FrameSampling(fps=vision.fps)
    elif vision.num_frames is not None:
        frames = FrameSampling(num_frames=vision.num_frames)
    return VisionOptions(
        reducer=vision.reducer,
        keep_ratio=vision.keep_ratio,
        positions=vision.positions,
        return_map=bool(vision.return_map),
        return_timings=bool(vision.return_timings),
        frames=frames,
    )


def _speculation(speculation: Speculation) -> SpeculationOptions:
    return SpeculationOptions(drafter=speculation.drafter, max_draft_tokens=speculation.max_draft_tokens)
