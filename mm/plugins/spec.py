"""The text form of reducers and drafters."""

from __future__ import annotations

import json
import re
from typing import Any

from mm.errors import InvalidOption, PluginError
from mm.plugins.capabilities import flat_stages
from mm.plugins.drafter import Drafter
from mm.plugins.reducer import (
    Reducer,
    Stage,
)
from mm.plugins.registry import PluginKind, create, get, names, options_of

COMMA = re.compile(r",(?![^\[]*\])")
"""Between options, not inside a list."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def parse_spec(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """The (name, options) pairs of a specification, in order.

    Raises:
        InvalidOption: The text does not follow the grammar.
    """
    return [_parse_one(part.strip(), spec) for part in spec.split("+")]


def _parse_one(part: str, spec: str) -> tuple[str, dict[str, Any]]:
    name, _, tail = part.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in COMMA.split(tail))):
        option, equals, value = item.partition("=")
        if not equals or not option.strip() or not value.strip():
            raise InvalidOption(name or spec, item, "is not of the form option=value")
        if option.strip() in options:
            raise InvalidOption(name, option.strip(), "is given twice")
        options[option.strip()] = _value(value.strip())
    if not name.strip():
        raise InvalidOption(spec, "name", "is missing; write name:option=value, joined by ' + '")
    return name.strip(), options


def build_reducer(spec: str, keep_ratio: float | None = None) -> Reducer:
    """The reducer, or the pipeline of several, that `spec` describes.

    Args:
        spec: See the module docstring.
        keep_ratio: Overrides the option of that name; only for a specification of one reducer.

    Raises:
        UnknownPlugin, InvalidOption: As `create`.
    """
    parts = parse_spec(spec)
    if keep_ratio is not None:
        if len(parts) > 1:
            raise InvalidOption(
                spec, "keep_ratio", "is ambiguous for several reducers; write it inside the specification"
            )
        name, options = parts[0]
        if "keep_ratio" not in options_of(get("reducer", name)):
            raise InvalidOption(name, "keep_ratio", "does not exist: this reducer has no such budget")
        parts = [(name, options | {"keep_ratio": keep_ratio})]
    reducers = [create("reducer", name, **options) for name, options in parts]
    return reducers[0] if len(reducers) == 1 else create("reducer", "pipeline", stages=tuple(reducers))


def build_drafter(spec: str) -> Drafter:
    """The drafter, or the hybrid of several, that `spec` describes.

    Raises:
        UnknownPlugin, InvalidOption: As `create`.
    """
    drafters = [create("drafter", name, **options) for name, options in parse_spec(spec)]
    return drafters[0] if len(drafters) == 1 else create("drafter", "hybrid", stages=tuple(drafters))


def canonical_spec(plugin: Any, kind: PluginKind = "reducer") -> str:
    """One text per distinct configuration, for cache keys and metrics. Parses back to an equal plugin."""
    stages = getattr(plugin, "stages", None)
    if stages is not None:
        return " + ".join(canonical_spec(stage, kind) for stage in stages)
    for name in names(kind):
        if get(kind, name) is type(plugin):
            options = {option: getattr(plugin, option) for option in options_of(type(plugin))}
            tail = ",".join(f"{option}={_written(value)}" for option, value in sorted(options.items()))
            return f"{name}:{tail}" if tail else name
    raise PluginError(f"{type(plugin).__qualname__} is not registered as a {kind}")


def _written(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def encode_spec(reducer: Reducer) -> str:
    """Canonical text of what happens to an item's tokens before the decoder: all that encoded features depend on."""
    outside = [stage for stage in flat_stages(reducer) if stage.stage not in (Stage.IN_PREFILL, Stage.IN_DECODE)]
    return " + ".join(canonical_spec(stage) for stage in outside) or "none"
