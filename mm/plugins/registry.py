"""The one registry of plugins: reducers, drafters, encoders and model families of the installed distributions."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Literal

from mm.errors import InvalidOption, MissingPackage, PluginError, UnknownPlugin, nearest

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
