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
from typing import Annotated, Any, cast

from annotated_types import Ge, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from mm.data.request import SpeculationOptions, VisionOptions
from mm.data.sampling_params import SamplingParams
from serve.api.fields import json_fields

INT64 = 2**63
INT32 = 2**31
MAX_SALT_CHARACTERS = 256

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
"""Its content is checked by `SamplingParams`, for Python callers too."""


NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
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
STRUCTURED = {
    "type": "object",
    "properties": {"json": {"type": "object"}, "json_object": {"type": "boolean"}},
    "additionalProperties": False,
}

WIRE_TYPES = {
    "logit_bias": Bias,
    "response_format": Form,
    "seed": Annotated[int, Ge(-INT64), Lt(INT64)],
    "stop": Stop,
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


class Vision(create_model("Vision", __config__=STRICT, **cast(dict[str, Any], json_fields(VisionOptions)))):
    """The `vision` object: what to do with visual tokens."""


class Speculation(
    create_model("Speculation", __config__=STRICT, **cast(dict[str, Any], json_fields(SpeculationOptions)))
):
    """The `speculation` object: what is drafted ahead of the decoder. It changes an answer's speed, not its text."""

    return_accepted: bool | None = Field(default=None, description="Report which text was drafted and accepted.")


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
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = Field(
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
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = Field(
        default=None, description="Variables for the checkpoint's chat template, such as enable_thinking."
    )
    mm_processor_kwargs: dict[str, Any] | None = Field(
        default=None, description="As in vLLM. Only num_frames and fps are known; they mean what they do in vision."
    )
    guided_json: Annotated[Any, WithJsonSchema({"type": "object"})] | None = Field(
        default=None, description="As in older vLLM: the JSON schema of a response_format."
    )
    structured_outputs: Annotated[dict[str, Any], WithJsonSchema(STRUCTURED)] | None = Field(
        default=None, description="As in vLLM: json, a JSON schema, or json_object, true."
    )
