"""The one registry of plugins, and the grammar in which reducers and drafters are written. Where plugins import from.

Reducers, drafters, encoders and model families are found through entry points of the installed distributions: ours
arrive by the same road as a stranger's. Listing names imports no plugin. What each of them promises is in
`mm.core.protocols`, whose names this module offers too.

A reducer's or drafter's specification, wherever one is written (command line, request, Python), has one grammar:

    name                              divprune
    name:option=value,option=value    divprune:keep_ratio=0.25
    one + another                     uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5
    a list as a value                 pyramiddrop:at_layers=[8,16,24]

Reducers act one behind the other; of several drafters the first that has something to propose is heard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal

from mm.core.data import Grid, Positions
from mm.core.drafting import Drafter
from mm.core.errors import IncompatiblePlugin, InvalidOption, MissingPackage, PluginError, UnknownPlugin, nearest
from mm.core.protocols import (
    ATTENTION_RECEIVED,
    BLOCK_KEYS,
    CLS_ATTENTION,
    TEXT_EMBEDDINGS,
    TOWER_FEATURES,
    TOWER_KEYS,
    CacheView,
    Count,
    Encoder,
    Family,
    InDecode,
    InPrefill,
    InTower,
    Matched,
    PrefillView,
    ReadsText,
    ReduceContext,
    Reducer,
    Reduction,
    Stage,
)

PluginKind = Literal["reducer", "drafter", "encoder", "family"]
KINDS: dict[PluginKind, str] = {
    "reducer": "mm.reducers",
    "drafter": "mm.drafters",
    "encoder": "mm.encoders",
    "family": "mm.families",
}
"""Plugin kind to entry-point group."""


@functools.cache
def _entry_points(kind: PluginKind) -> Mapping[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=KINDS[kind]):
        earlier = found.setdefault(point.name, point)
        if earlier.value != point.value:
            raise PluginError(f"two {kind}s are named {point.name!r}: {earlier.value} and {point.value}; uninstall one")
    return found


def names(kind: PluginKind) -> list[str]:
    """Registered names of a kind, sorted. Imports no plugin."""
    return sorted(_entry_points(kind))


def get(kind: PluginKind, name: str) -> Any:
    """The plugin class registered under `name`.

    Raises:
        UnknownPlugin: No such name.
        MissingPackage: It needs a package that is not installed.
    """
    points = _entry_points(kind)
    if name not in points:
        raise UnknownPlugin(kind, name, sorted(points))
    try:
        return points[name].load()
    except ModuleNotFoundError as error:
        raise MissingPackage(kind, name, error.name or str(error)) from error


def options_of(plugin: Any) -> dict[str, dataclasses.Field]:
    """The options a plugin class takes: its dataclass fields."""
    return {f.name: f for f in dataclasses.fields(plugin)} if dataclasses.is_dataclass(plugin) else {}


def create(kind: PluginKind, name: str, /, **options: Any) -> Any:
    """Build the plugin `name` with `options`.

    Raises:
        UnknownPlugin: No such name.
        InvalidOption: An option it does not have, or a value it refuses.
    """
    plugin = get(kind, name)
    known, takes_fields_only = options_of(plugin), dataclasses.is_dataclass(plugin)
    for option in options:
        if takes_fields_only and option not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise InvalidOption(name, option, f"does not exist{nearest(option, list(known))} (options: {allowed})")
    return plugin(**options)


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


def check_compatible(reducer: Reducer, encoder: Encoder, host: str) -> None:
    """Refuse a reducer that needs what the encoder does not supply.

    Raises:
        IncompatiblePlugin: Names what is missing.
    """
    missing = sorted(reducer.needs - encoder.provides)
    if missing:
        raise IncompatiblePlugin(type(reducer).__name__, host, missing)
    if (merging := tower_stage(reducer)) is not None:
        lost = sorted(reducer.needs - BEHIND_MERGING) + ([BLOCK_KEYS] if BLOCK_KEYS not in encoder.provides else [])
        if lost:
            behind = [f"{name} with {type(merging).__name__} in its tower" for name in lost]
            raise IncompatiblePlugin(type(reducer).__name__, host, behind)


BEHIND_MERGING = frozenset({BLOCK_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS})
"""What an encoder supplies, of what it provides, when tokens were merged inside its tower."""


def tower_stage(reducer: Reducer) -> InTower | None:
    """The reducer that acts inside the tower, if there is one.

    Raises:
        InvalidOption: There are several.
    """
    inside: list[Any] = [stage for stage in flat_stages(reducer) if stage.stage is Stage.IN_VIT]
    if len(inside) > 1:
        raise InvalidOption("pipeline", "stages", "take one reducer inside the tower, not several")
    return inside[0] if inside else None


def flat_stages(reducer: Reducer) -> tuple[Reducer, ...]:
    """The reducers of a pipeline, or the one there is."""
    return tuple(getattr(reducer, "stages", None) or (reducer,))


def encode_spec(reducer: Reducer) -> str:
    """Canonical text of what happens to an item's tokens before the decoder: all that encoded features depend on."""
    outside = [stage for stage in flat_stages(reducer) if stage.stage not in (Stage.IN_PREFILL, Stage.IN_DECODE)]
    return " + ".join(canonical_spec(stage) for stage in outside) or "none"


def inner_stages(reducer: Reducer) -> tuple[tuple[InPrefill, ...], tuple[InDecode, ...]]:
    """The reducers that act inside the decoder: in prefill, and on the cache. One may be both."""
    stages: tuple[Any, ...] = flat_stages(reducer)
    return (
        tuple(stage for stage in stages if hasattr(stage, "in_prefill")),
        tuple(stage for stage in stages if hasattr(stage, "prefill_done")),
    )


def positions_of(reducer: Reducer) -> Positions:
    """What the reducer wants of the positions behind what it drops: "compact" where one of its stages says so."""
    asked = (getattr(stage, "positions", "kept") for stage in flat_stages(reducer))
    return "compact" if "compact" in asked else "kept"


def least_keep_ratio(reducer: Reducer) -> float | None:
    """Tokens kept / tokens in, at worst; None where it depends on the picture or the question."""
    least, side = 1.0, 100
    for stage in flat_stages(reducer):
        ratio = getattr(stage, "keep_ratio", None)
        if ratio is None and stage.count == "fixed":
            ratio = stage.plan(side**2, (1, side, side)) / side**2
        if ratio is None:
            return None
        least *= ratio
    return least


CAPABILITIES = ("stage", "needs", "provides", "kinds", "query_aware", "count", "model_types", "trained")


def describe(kind: PluginKind) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per registered plugin, with its capabilities; imports the plugins.

    One that cannot be imported for want of a package has `unavailable` instead.
    """
    for name in names(kind):
        try:
            yield {"kind": kind, "name": name} | _capabilities(get(kind, name))
        except MissingPackage as error:
            yield {"kind": kind, "name": name, "summary": "", "unavailable": str(error), "options": {}}


def _capabilities(plugin: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"summary": (plugin.__doc__ or "").strip().split("\n")[0]}
    for flag in CAPABILITIES:
        value = getattr(plugin, flag, None)
        if value is None or callable(value) or isinstance(value, property):
            continue
        row[flag] = value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, frozenset) else value
    row["options"] = {
        option: None if f.default is dataclasses.MISSING else f.default for option, f in options_of(plugin).items()
    }
    return row


__all__ = [
    "ATTENTION_RECEIVED",
    "BEHIND_MERGING",
    "BLOCK_KEYS",
    "CLS_ATTENTION",
    "KINDS",
    "TEXT_EMBEDDINGS",
    "TOWER_FEATURES",
    "TOWER_KEYS",
    "CacheView",
    "Count",
    "Drafter",
    "Encoder",
    "Family",
    "Grid",
    "InDecode",
    "InPrefill",
    "InTower",
    "Matched",
    "PluginKind",
    "PrefillView",
    "ReadsText",
    "ReduceContext",
    "Reducer",
    "Reduction",
    "Stage",
    "build_drafter",
    "build_reducer",
    "canonical_spec",
    "check_compatible",
    "create",
    "describe",
    "encode_spec",
    "flat_stages",
    "get",
    "inner_stages",
    "least_keep_ratio",
    "names",
    "options_of",
    "parse_spec",
    "positions_of",
    "tower_stage",
]
