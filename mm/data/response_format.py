"""The form that an answer has to have: OpenAI's `response_format`, with limits on a schema's size and depth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

from mm.data.checks import is_number
from mm.errors import InvalidRequest, shown

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_MULTIPLE = 100_000
"""Largest least common multiple of every `multipleOf` in a schema. The grammar has a state per remainder, and a million
of them take 350 MB."""


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """The form that an answer has to have.

    Attributes:
        kind: "json_object" is any JSON object, "json_schema" is one that fits `schema`.
        schema: The JSON schema as JSON text. It is enforced whether or not it is called strict.
    """

    kind: Literal["json_object", "json_schema"]
    schema: str | None = None

    @classmethod
    def parse(cls, value: object, param: str = "response_format") -> ResponseFormat | None:
        """Read OpenAI's `response_format` object. The type "text" gives None.

        Raises:
            InvalidRequest: Names the part that cannot be used.
        """
        if value is None or isinstance(value, ResponseFormat):
            return value
        given = _fields(value)
        kind = given.get("type")
        if kind not in ("text", "json_object", "json_schema"):
            raise InvalidRequest(
                f"{param} has to be an object whose type is text, json_object or json_schema; it was {shown(value)}",
                param if kind is None else f"{param}.type",
            )
        allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
        check_known_fields(given, allowed, param)
        if kind == "json_schema":
            return cls(kind="json_schema", schema=_schema(given.get("json_schema"), f"{param}.json_schema"))
        return cls(kind="json_object") if kind == "json_object" else None


def _fields(value: Any) -> Mapping[str, Any]:
    """The fields of a JSON object, and none of any other value."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _schema(value: Any, param: str) -> str:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param} has to be an object with name and schema; it was {shown(value)}", param)
    given = _fields(value)
    check_known_fields(given, {"name", "description", "schema", "strict"}, param)
    name, strict, schema = given.get("name"), given.get("strict"), given.get("schema")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InvalidRequest(
            f"{param}.name was {shown(name)}; it has to be 1 to 64 letters, digits, _ or -", f"{param}.name"
        )
    if not isinstance(strict, bool | None):
        raise InvalidRequest(f"{param}.strict was {shown(strict)}; it has to be true or false", f"{param}.strict")
    if not isinstance(schema, Mapping):
        raise InvalidRequest(
            f"{param}.schema was {shown(schema)}; it has to be a JSON schema object", f"{param}.schema"
        )
    return _schema_text(_fields(schema), f"{param}.schema")


def _schema_text(schema: Mapping[str, Any], param: str) -> str:
    """The schema as JSON text, after its size and depth were checked."""
    too_large = InvalidRequest(f"{param} takes more than the limit of {MAX_SCHEMA_BYTES} bytes", param)
    level: list[Any] = [schema]
    num_values, multiples = 1, list[float]()
    for _ in range(MAX_SCHEMA_DEPTH):
        found = [_fields(value).get("multipleOf") for value in level]
        multiples += [value for value in found if is_number(value)]
        level = [child for value in level for child in _children(value)]
        num_values += len(level)
        if num_values > MAX_SCHEMA_BYTES:  # each takes at least a byte
            raise too_large
    if level:
        raise InvalidRequest(f"{param} is nested deeper than the limit of {MAX_SCHEMA_DEPTH} levels", param)
    if _common_multiple(multiples) > MAX_MULTIPLE:
        message = f"{param} has multipleOf whose least common multiple takes more than {MAX_MULTIPLE} steps"
        raise InvalidRequest(message, param)
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError):
        raise InvalidRequest(f"{param} holds what is no JSON", param) from None
    if size > MAX_SCHEMA_BYTES:
        raise too_large
    return text


def _common_multiple(values: Sequence[float]) -> int:
    """The least common multiple, in units of the last decimal place of any of the values."""
    parts = [Decimal(v if isinstance(v, int) else repr(v)) for v in values if v]
    exponents = [exponent for part in parts if isinstance(exponent := part.as_tuple().exponent, int)]
    places = max(0, -min(exponents, default=0))
    if max((part.adjusted() for part in parts), default=0) + places > 30:
        return 10**30
    return math.lcm(*(abs(int(part.scaleb(places))) for part in parts))


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(_fields(value).values())
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def check_known_fields(value: Mapping[str, Any], allowed: set[str], param: str) -> None:
    """Refuse fields that are not known, unless they are null.

    Raises:
        InvalidRequest: Names the first of them.
    """
    unknown = sorted(str(name) for name, given in value.items() if name not in allowed and given is not None)
    if unknown:
        name = unknown[0][:100]
        raise InvalidRequest(
            f"{param}.{name} is unknown; allowed: {', '.join(sorted(allowed))}", f"{param}.{name}", "unknown_parameter"
        )
