"""The limits in the OpenAPI document that depend on the model and on the operator's settings.

A schema says with its `format` which limit is meant, and the document that a server shows has its value: the number of
token ids, which addresses media may have, which reducers there are. So a tool that reads the document sends what the
server takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from mm.plugins.registry import names
from serve.api.render import JsonObject
from serve.api.schema import DRAFTER, MEDIA_URL, REDUCER, TOKEN_ID
from serve.config import ServeConfig
from serve.runtime import ModelInfo

DATA_URL = "data:(image|video)/[a-z0-9.+-]+;base64,([A-Za-z0-9+/]{4})+"
"""The usual form of a data: URL. Others that browsers read are taken too."""
OPTIONS = "(:[a-z_]+=[A-Za-z0-9_.]+(,[a-z_]+=[A-Za-z0-9_.]+)*)?"


def state_limits(document: JsonObject, config: ServeConfig, info: ModelInfo) -> None:
    """Write the limits of a server into its document."""
    formats = _formats(config, info)
    limits = _limits(config, info)
    for schema in _schemas(document):
        stated = formats.get(str(schema.get("format")))
        if stated is not None:
            stated(schema)
        for name, prop in cast(JsonObject, schema.get("properties", {})).items():
            if name in limits:
                _set_maximum(prop, limits[name])


def _formats(config: ServeConfig, info: ModelInfo) -> dict[str, Callable[[JsonObject], None]]:
    last = info.num_token_ids - 1

    def token_id(schema: JsonObject) -> None:
        schema |= {"maximum": last} if schema.get("type") == "integer" else {"pattern": f"^({up_to(last)})$"}

    return {
        TOKEN_ID: token_id,
        MEDIA_URL: lambda schema: schema.update(pattern=f"^({address_pattern(config.model.sources.allowed_domains)})$"),
        REDUCER: lambda schema: schema.update(pattern=f"^({'|'.join(names('reducer'))}){OPTIONS}$"),
        DRAFTER: lambda schema: schema.update(enum=list(config.model.speculation.offered)),
    }


def _limits(config: ServeConfig, info: ModelInfo) -> Mapping[str, int]:
    answer = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
    return {
        "n": config.max_choices,
        "num_frames": config.model.limits.max_sampled_frames,
        **dict.fromkeys(answer, info.max_context_tokens),
    }


def _set_maximum(schema: JsonObject, maximum: int) -> None:
    for one in (schema, *cast(list[JsonObject], schema.get("anyOf", []))):
        if "integer" in (one.get("type"), *(one["type"] if isinstance(one.get("type"), list) else ())):
            one.pop("exclusiveMaximum", None)
            one["maximum"] = min(maximum, one.get("maximum", maximum))


def address_pattern(domains: tuple[str, ...]) -> str:
    """A regular expression of the addresses that media may have, without its ends."""
    if not domains:
        return DATA_URL
    hosts = "[^/?#]+" if "*" in domains else f"({'|'.join(re.escape(domain) for domain in domains)})(:[0-9]+)?"
    return f"{DATA_URL}|https?://{hosts}(/[!-~]*)?"


def up_to(last: int) -> str:
    """A regular expression, without its ends, of the decimal numbers from 0 to `last`, without leading zeros."""
    digits = str(last)
    found = [f"[1-9][0-9]{{{n - 1}}}" if n > 1 else "[0-9]" for n in range(1, len(digits))]
    for i, digit in enumerate(digits):
        lowest = 1 if i == 0 and len(digits) > 1 else 0
        if int(digit) > lowest:
            found.append(f"{digits[:i]}[{lowest}-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}")
    return "|".join([*found, digits])


def _schemas(node: Any) -> Iterator[JsonObject]:
    """Every object of the document."""
    if isinstance(node, dict):
        found = cast(JsonObject, node)
        yield found
        for value in list(found.values()):
            yield from _schemas(value)
    elif isinstance(node, list):
        for value in cast(list[Any], node):
            yield from _schemas(value)
