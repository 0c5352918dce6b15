"""What the grammar of a JSON schema cannot say: it is left out of the grammar, and checked when the answer is complete.

The grammar library does not know `not`, `if`, `uniqueItems` and some more keywords. A schema that has them is relaxed
for the grammar. The complete answer is then validated against the whole schema, with bounds on the time that takes:
both the schema and, through the prompt, the answer are the client's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import regex
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema import validators as jsonschema_validators
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from mm.errors import InvalidRequest, SchemaNotFulfilled, shown

Schema = dict[str, Any]

CHECKED = frozenset(
    {
        *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "propertyNames", "uniqueItems"),
        *("contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords that are checked and are no part of the grammar."""

FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"),
    }
)
"""Formats that the grammar enforces. Any other is an annotation, as JSON Schema has it, and enforces nothing."""

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
)
"""They say nothing about an answer's form, and beside a recursive reference the library takes them for a rule."""

ONE_SCHEMA = frozenset(
    {"items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
BACKTRACKING = re.compile(r"\(\?<?[=!]|\\[1-9]|\(\?\(|\(\?P=|\(\?>|[*+?}]\+")
"""What regular expressions need that look around or back, which the grammar's automata cannot do."""

MAX_STEPS = 20_000
"""Keywords that one check may apply."""
PATTERN_TIMEOUT_S = 0.05


def relaxed(schema: Schema, *, one_of_as_any: bool = False) -> tuple[Schema, bool]:
    """The schema for the grammar, and whether a complete answer has to be checked.

    Args:
        one_of_as_any: Let the grammar take what fits any alternative of a `oneOf`, for those of which the library
            cannot tell that at most one fits.

    Raises:
        InvalidRequest: It has what can neither be enforced nor checked.
    """
    relaxing = _Relaxing(one_of_as_any=one_of_as_any)
    grammar = relaxing.walk(schema)
    if relaxing.is_checked:
        check_checkable(schema)
    return grammar, relaxing.is_checked


def check_checkable(schema: Schema) -> None:
    """Refuse a schema that answers cannot be checked against.

    Raises:
        InvalidRequest: It breaks the rules of JSON Schema, has a regular expression that cannot be read, or
            combines keywords that cannot be checked together.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _unusable(f"{shown(error.validator_value)} is not a value of {shown(list(error.path)[-1:])}") from None
    relaxing = _Relaxing()
    relaxing.walk(schema)
    for pattern in relaxing.patterns:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise _unusable(f"the pattern {shown(pattern)} cannot be read: {error}") from None
    for reference in relaxing.references:
        _resolve(schema, reference)
    if {"unevaluatedProperties", "patternProperties"} <= relaxing.keywords:
        raise _unusable("unevaluatedProperties beside patternProperties cannot be checked")


def _resolve(schema: Schema, reference: str) -> None:
    registry: Any = cast(Any, Registry)().with_resource("", DRAFT202012.create_resource(schema))
    try:
        registry.resolver().lookup(reference)
    except Unresolvable:
        raise _unusable(f"{shown(reference)} leads nowhere; only parts of the schema itself can be named") from None


def _unusable(problem: str) -> InvalidRequest:
    return InvalidRequest(f"the schema cannot be used: {problem}", "response_format.json_schema.schema")


class _Relaxing:
    """Takes out of a schema what the grammar does not know.

    Attributes:
        is_checked: Whether something was taken out that answers have to fulfil.
        patterns: All regular expressions.
        references: All values of `$ref`.
        keywords: All keywords.
    """

    def __init__(self, *, one_of_as_any: bool = False) -> None:
        self._one_of_as_any = one_of_as_any
        self.is_checked = False
        self.patterns: set[str] = set()
        self.references: set[str] = set()
        self.keywords: set[str] = set()

    def walk(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        schema = cast(Schema, value)
        self.keywords |= schema.keys()
        self.patterns |= {str(one) for one in (schema.get("pattern"), *_members(schema, "patternProperties")) if one}
        self.references |= {str(schema[key]) for key in ("$ref", "$dynamicRef") if key in schema}
        if self._one_of_as_any and "oneOf" in schema and "anyOf" not in schema:
            self.is_checked = True
            schema = {"anyOf" if key == "oneOf" else key: part for key, part in schema.items()}
        parts = {key: _parts(key, part, self.walk) for key, part in schema.items()}
        return {key: part for key, part in parts.items() if self._is_for_grammar(key, part, schema)}

    def _is_for_grammar(self, key: str, part: Any, schema: Schema) -> bool:
        if key in ANNOTATIONS:
            return False
        if key == "format":
            return not isinstance(part, str) or part in FORMATS
        is_left_out = (
            key in CHECKED
            or (key == "pattern" and isinstance(part, str) and BACKTRACKING.search(part) is not None)
            or (key in ("minProperties", "maxProperties") and _has_optional_properties(schema))
        )
        if is_left_out and not (key == "uniqueItems" and part is False):
            self.is_checked = True
        return not is_left_out


def _members(schema: Schema, key: str) -> list[str]:
    members = schema.get(key)
    return list(cast(Schema, members)) if isinstance(members, dict) else []


def _has_optional_properties(schema: Schema) -> bool:
    """Whether an object may lack some of its properties; the grammar cannot count those."""
    required: Any = schema.get("required", [])
    return not (
        isinstance(required, list) and set(_members(schema, "properties")) <= set(map(str, cast(list[Any], required)))
    )


def _parts(key: str, part: Any, walk: Any) -> Any:
    """The value of a keyword, with `walk` applied to the schemas in it."""
    if key in SCHEMA_MAPS and isinstance(part, dict):
        return {name: walk(one) for name, one in cast(Schema, part).items()}
    if key in SCHEMA_LISTS and isinstance(part, list):
        return [walk(one) for one in cast(list[Any], part)]
    return walk(part) if key in ONE_SCHEMA else part


class SchemaCheck:
    """Checks complete answers against a schema. Used by one thread at a time."""

    def __init__(self, schema: Schema) -> None:
        self._num_steps = 0
        rules = {**Draft202012Validator.VALIDATORS, **OWN_RULES}
        limited = {name: self._limited(rule) for name, rule in rules.items()}
        # An empty registry: nothing is fetched.
        validator_class = cast(Any, jsonschema_validators).extend(Draft202012Validator, limited)
        self._validator: Any = validator_class(schema, registry=cast(Any, Registry)())

    def check(self, text: str) -> None:
        """Refuse an answer that is complete JSON and not of the schema. An answer that was cut is let through.

        Raises:
            SchemaNotFulfilled: Names the keyword and the place, or that the check takes too long.
        """
        self._num_steps = 0
        try:
            value = json.loads(text, parse_float=_number)
            error: Any = next(self._validator.iter_errors(value), None)
        except json.JSONDecodeError:
            return
        except (_TooLong, TimeoutError, RecursionError):
            raise SchemaNotFulfilled("the answer takes too long to check against the schema; simplify it") from None
        if error is not None:
            place = "".join(f"[{shown(step)}]" for step in list(error.absolute_path)[:8]) or "its root"
            raise SchemaNotFulfilled(
                f"the model's answer does not fulfil {shown(error.validator)} at {place}; ask again"
            )

    def _limited(self, rule: Any) -> Any:
        def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            self._num_steps += 1
            if self._num_steps > MAX_STEPS:
                raise _TooLong
            yield from rule(validator, value, instance, schema) or ()

        return apply


class _TooLong(Exception):
    pass


def _number(text: str) -> float | int:
    """1.0 and 1 are the same number in JSON Schema."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _matches(pattern: str, text: str) -> bool:
    # Not `re`, which has no time limit.
    return regex.search(pattern, text, timeout=PATTERN_TIMEOUT_S) is not None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError("does not match")


def _pattern_properties(validator: Any, patterns: Schema, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        members = cast(Schema, instance)
        for pattern, rule in patterns.items():
            for name in (name for name in members if _matches(pattern, name)):
                yield from validator.descend(members[name], rule, path=name, schema_path=pattern)


def _additional(validator: Any, rule: Any, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    members = cast(Schema, instance)
    for name in members:
        if name not in known and not any(_matches(pattern, name) for pattern in patterns):
            yield from validator.descend(members[name], rule, path=name)


def _unique(validator: Any, is_wanted: bool, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    if is_wanted and isinstance(instance, list):
        texts = [json.dumps(item, sort_keys=True) for item in cast(list[Any], instance)]
        if len(set(texts)) < len(texts):
            yield ValidationError("has equal items")


OWN_RULES: Mapping[str, Any] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
    "uniqueItems": _unique,
}
"""In place of jsonschema's: regular expressions with a timeout, and equal items found without comparing all pairs."""
