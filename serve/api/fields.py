"""JSON fields made from the options that a request's dataclasses declare: name, type, range and description.

An option is declared once, with its dataclass. It is then a field of the HTTP body and of its OpenAPI schema, checked
against the range that its declaration gives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, Gt, Le, MaxLen, MinLen
from pydantic import Field

from mm.settings import KEY, Bounds

FieldDefinition = tuple[Any, Any]
"""A type and a default, as `pydantic.create_model` takes them."""


def json_fields(cls: type, wire_types: Mapping[str, Any] = MappingProxyType({})) -> dict[str, FieldDefinition]:
    """A field for each option of a dataclass and of the dataclasses in it. All may be absent or null.

    Args:
        wire_types: By option, the type that JSON has where it is not the dataclass's own.
    """
    return {
        one.name: _definition(wire_types.get(one.name, _json_type(hint)), one.metadata.get(KEY))
        for one, hint in options_of(cls)
    }


@functools.cache
def options_of(cls: type) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """The fields of a dataclass with their types; a nested dataclass is replaced by its own fields.

    Every request asks for them, and reading type hints takes a millisecond.
    """
    return tuple(_options_of(cls))


def _options_of(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    for one in dataclasses.fields(cls):
        hint = _without_none(hints[one.name])
        bounds = one.metadata.get(KEY)
        if bounds is not None and bounds.hidden:
            continue
        if bounds is None and one.name in NESTED:
            yield from options_of(hint)
        else:
            yield one, hint


NESTED = frozenset({"frames"})
"""Dataclasses whose fields are beside the others in JSON."""


def _definition(annotation: Any, bounds: Bounds | None) -> FieldDefinition:
    if bounds is None:
        return annotation | None, Field(default=None)
    if limits := tuple(_limits(bounds)):
        annotation = Annotated[(annotation, *limits)]
    return annotation | None, Field(default=None, description=bounds.help or None)


def _limits(bounds: Bounds) -> Iterator[BaseMetadata]:
    if bounds.above is not None:
        yield Gt(bounds.above)
    if bounds.min is not None:
        yield Ge(bounds.min)
    if bounds.max is not None:
        yield Le(bounds.max)
    if bounds.max_chars is not None:
        yield from (MinLen(1), MaxLen(bounds.max_chars))


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(option for option in get_args(hint) if option is not type(None))


def _json_type(hint: Any) -> Any:
    """The JSON type of a Python type: a list for a tuple."""
    return list[get_args(hint)[0]] if get_origin(hint) is tuple else hint
