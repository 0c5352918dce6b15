"""The JSON body of a chat request, as pydantic models. `serve.api.parse` turns it into a `Request`.

The options of a request are declared by its dataclasses (`SamplingParams`, `VisionOptions`, `SpeculationOptions`), and
the fields here are made from these. Only what HTTP alone has is written out: OpenAI's other names, forms that differ in
JSON, and limits of JSON's numbers.

Beside the fields that are carried out there are three kinds. Some cannot change the answer and are ignored. Some are
accepted only at the value that makes no difference. The rest is refused by name. No field that changes the answer
is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, cast

from annotated_types import Ge, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from mm.data.request import SpeculationOptions, VisionOptions
from mm.data.sampling_params import (
    MAX_BIASES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from serve.api.fields import json_fields
from serve.api.other_names import MAX_OPTIONS, RESERVED

INT64 = 2**63
INT32 = 2**31
MAX_SALT_CHARACTERS = 256
TOKEN_ID, MEDIA_URL, REDUCER, DRAFTER = "token-id", "media-url", "reducer", "drafter"
"""Formats of the OpenAPI document, whose limits depend on model and settings: see `serve.api.document_limits`."""

IGNORED = frozenset(
    {
        "generation_config",
        "guided_decoding_backend",
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's clients, and of terminal chat clients, that have no effect on the answer's text."""

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
    "bad_words": ([],),
    "documents": ([],),
    "guided_choice": ([],),
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields that are not implemented, with the values at which that makes no difference."""

HINTS: Mapping[str, str] = {
    "audio": "audio is not generated here",
    "chat_template": "the operator chooses it, with --chat-template FILE",
    "function_call": "send tools and tool_choice",
    "functions": "send tools",
    "guided_choice": 'send a response_format of the type json_schema with {"enum": [...]}',
    "guided_grammar": "send a response_format",
    "guided_regex": 'send a response_format of the type json_schema with {"type": "string", "pattern": ...}',
    "length_penalty": "it belongs to beam search, which is not done here",
    "logit_processors": "send logit_bias",
    "prompt": "send messages, or the prompt to /v1/completions",
    "input": "send messages, or the input to /v1/responses or /v1/embeddings",
    "use_beam_search": "send n, or a low temperature",
    "web_search_options": "nothing is fetched from the web",
}
"""What to do in place of a field that is refused."""


NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
SCHEMA_FIELDS = {
    "name": NAME,
    "description": {"type": "string"},
    "schema": {"type": "object"},
    "strict": {"type": ["boolean", "null"]},
}


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stop = Annotated[
    list[str],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    WithJsonSchema({"anyOf": [STOP_STRING, {"type": "array", "items": STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}),
]
Bias = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$", "format": TOKEN_ID},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]
StopTokens = Annotated[
    list[Any],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "integer", "format": TOKEN_ID, "minimum": 0},
            "maxItems": MAX_STOP_TOKEN_IDS,
        }
    ),
]
FORMS = [
    closed("type", type={"enum": ["text", "json_object"]}),
    closed("type", "json_schema", type={"const": "json_schema"}, json_schema=closed("name", "schema", **SCHEMA_FIELDS)),
]
Form = Annotated[dict[str, Any], WithJsonSchema({"oneOf": FORMS})]
"""Its content is checked by `SamplingParams`, for Python callers too."""


FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": NAME, "description": {"type": "string"}, "parameters": {"type": "object"}},
}
TOOLS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": FUNCTION},
    },
}
TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
            },
        },
    ]
}
STRUCTURED = {"oneOf": [closed("json", json={"type": "object"}), closed("json_object", json_object={"const": True})]}

WIRE_TYPES = {
    "logit_bias": Bias,
    "response_format": Form,
    "seed": Annotated[int, Ge(-INT64), Lt(INT64)],
    "stop": Stop,
    "stop_token_ids": StopTokens,
}
"""Sampling options whose JSON type is not that of `SamplingParams`."""

STRICT = ConfigDict(extra="forbid", strict=True)


def sampling_fields() -> dict[str, Any]:
    """A field for each sampling option, but for the longest answer, which has several names in HTTP."""
    fields = json_fields(SamplingParams, WIRE_TYPES)
    del fields["max_new_tokens"]
    return fields


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


ABSENT = {"type": "null"}


def at_most_one(*names: str) -> dict[str, Any]:
    """That no two of these fields are given."""
    pairs = combinations(names, 2)
    given = {"not": ABSENT}
    return {"allOf": [{"not": {"required": list(pair), "properties": dict.fromkeys(pair, given)}} for pair in pairs]}


def needs(name: str, value: dict[str, Any], other: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """That a field with such a value needs another field."""
    return {
        "if": {"required": [name], "properties": {name: value}},
        "then": {"required": [other], "properties": {other: wanted}},
    }


LOGPROBS_RULE = needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", {"const": True})
BODY_RULES = [
    LOGPROBS_RULE,
    needs("tool_choice", {"not": {"enum": ["none", "auto", None]}}, "tools", {"type": "array", "minItems": 1}),
    needs("ignore_eos", {"const": True}, "response_format", ABSENT),
    at_most_one("response_format", "structured_outputs", "guided_json"),
]
"""What `SamplingParams` and the parser check of several fields together."""
ONE_SAMPLING: dict[str, Any] = at_most_one("num_frames", "fps")
"""Frames are chosen by their number or by their rate."""


def vision_fields(*names: str) -> dict[str, Any]:
    """Fields of the `vision` object: these, or all."""
    found = json_fields(VisionOptions, {"reducer": Annotated[str, Field(json_schema_extra={"format": REDUCER})]})
    return {name: field for name, field in found.items() if not names or name in names}


VISION = STRICT | ConfigDict(json_schema_extra=ONE_SAMPLING)
DRAFTERS = {"drafter": Annotated[str, Field(json_schema_extra={"format": DRAFTER})]}


class Vision(create_model("Vision", __config__=VISION, **vision_fields())):
    """The `vision` object: what to do with visual tokens."""


class Speculation(
    create_model("Speculation", __config__=STRICT, **cast(dict[str, Any], json_fields(SpeculationOptions, DRAFTERS)))
):
    """The `speculation` object: what is drafted ahead of the decoder. It changes an answer's speed, not its text."""

    return_accepted: bool | None = Field(default=None, description="Report which text was drafted and accepted.")


Salt = Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)]
TEMPLATE_NAMES: dict[str, Any] = {"pattern": f"^(?!({'|'.join(sorted(RESERVED))})$)[A-Za-z][A-Za-z0-9_]*$"}
TemplateVariables = Annotated[
    dict[str, str | int | float | bool | None],
    Field(json_schema_extra={"propertyNames": TEMPLATE_NAMES, "maxProperties": MAX_OPTIONS}),
]
FRAME_OPTIONS = {
    **closed(
        num_frames={"anyOf": [{"type": "integer", "minimum": 1}, ABSENT]},
        fps={"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, ABSENT]},
    ),
    **ONE_SAMPLING,
}


class _Addressed(BaseModel):
    """What comes first in every chat request."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1, lt=INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT32)] | None = Field(
        default=None, description="Takes precedence over max_tokens."
    )


class ChatBody(create_model("Sampled", __base__=_Addressed, **sampling_fields())):
    """The body of `POST /v1/chat/completions`, as far as it is carried out."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(gt=-INT32, lt=INT32)] | None = Field(
        default=None, description="Lower is served first; 0 if absent. A request that waits too long is served next."
    )
    cache_salt: Salt | None = Field(
        default=None, description="Requests with different salts share nothing that is cached."
    )
    vision: Vision | None = None
    speculation: Speculation | None = None
    tools: Annotated[list[Any], WithJsonSchema(TOOLS)] | None = Field(
        default=None, description="Functions that the model may call."
    )
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE)] | None = Field(
        default=None, description="none, auto (the default), required, or one function by name."
    )
    chat_template_kwargs: TemplateVariables | None = Field(
        default=None, description="Variables for the checkpoint's chat template, such as enable_thinking."
    )
    mm_processor_kwargs: Annotated[dict[str, Any], WithJsonSchema(FRAME_OPTIONS)] | None = Field(
        default=None, description="As in vLLM. Only num_frames and fps are known; they mean what they do in vision."
    )
    guided_json: Annotated[Any, WithJsonSchema({"type": "object"})] | None = Field(
        default=None, description="As in older vLLM: the JSON schema of a response_format."
    )
    structured_outputs: Annotated[dict[str, Any], WithJsonSchema(STRUCTURED)] | None = Field(
        default=None, description="As in vLLM: json, a JSON schema, or json_object, true."
    )
