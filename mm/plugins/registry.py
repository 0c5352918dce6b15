"""The registry of plugins: the reducers, drafters, encoders and model families of the installed distributions.

A plugin is a class that an entry point names. The registry reads the entry points once and imports a plugin only when
it is asked for by name. A plugin that cannot be imported is a `PluginError` for whoever names it. Nobody else notices,
and `describe` lists it with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, EntryPoint
from typing import Any, Literal, cast, overload

from mm.errors import BrokenPlugin, InvalidOption, MissingPackage, PluginError, UnknownPlugin, nearest
from mm.plugins.declaration import declaration_problem
from mm.plugins.drafter import Drafter
from mm.plugins.encoder import Encoder
from mm.plugins.family import Family
from mm.plugins.reducer import Reducer, Stage
from mm.plugins.threads import is_interrupt

log = logging.getLogger(__name__)

PluginKind = Literal["reducer", "drafter", "encoder", "family"]


KINDS: dict[PluginKind, str] = {
    "reducer": "mm.reducers",
    "drafter": "mm.drafters",
    "encoder": "mm.encoders",
    "family": "mm.families",
}
"""Plugin kind to entry-point group."""

METHODS: dict[PluginKind, tuple[str, ...]] = {
    "reducer": (),
    "drafter": ("load",),
    "encoder": ("encode",),
    "family": ("splice",),
}
"""The methods that every class of a kind has. Those of a reducer follow from its declaration."""


@functools.cache
def _entry_points() -> Mapping[str, Mapping[str, tuple[EntryPoint, ...]]]:
    """Group to name to the entry points of that name. Two of one name are an error only for whoever names them."""
    found: dict[str, dict[str, list[EntryPoint]]] = {group: {} for group in KINDS.values()}
    for distribution in _distributions():
        try:
            points = [point for point in distribution.entry_points if point.group in found]
        except Exception as error:
            log.warning("unreadable_entry_points=%s error=%r", distribution.metadata["Name"], error)
            continue
        for point in points:
            same_name = found[point.group].setdefault(point.name, [])
            if all(other.value != point.value for other in same_name):
                same_name.append(point)
    return {group: {name: tuple(points) for name, points in names.items()} for group, names in found.items()}


def _distributions() -> Iterator[Distribution]:
    """Each installed distribution once: of several copies the first on sys.path, which is the one that is imported."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            yield distribution


def refresh() -> None:
    """Read the installed distributions again, for instance after an installation in a running process."""
    _entry_points.cache_clear()
    _names_by_value.cache_clear()
    _NAMES.clear()
    _load.cache_clear()


def names(kind: PluginKind) -> list[str]:
    """Registered names of a kind, sorted. Imports no plugin."""
    return sorted(_entry_points()[KINDS[kind]])


@overload
def get(kind: Literal["reducer"], name: str) -> type[Reducer]: ...
@overload
def get(kind: Literal["drafter"], name: str) -> type[Drafter]: ...
@overload
def get(kind: Literal["encoder"], name: str) -> type[Encoder]: ...
@overload
def get(kind: Literal["family"], name: str) -> type[Family[object]]: ...
@overload
def get(kind: PluginKind, name: str) -> type[object]: ...
def get(kind: PluginKind, name: str) -> type[object]:
    """The plugin class registered under `name`. Imports its module, and that of no other plugin.

    Raises:
        UnknownPlugin: No such name.
        MissingPackage: It needs a package that is not installed.
        BrokenPlugin: It cannot be imported, is registered twice, or is not a class of this kind.
    """
    if name not in _entry_points()[KINDS[kind]]:
        raise UnknownPlugin(kind, name, names(kind))
    found = _load(kind, name)
    if isinstance(found, PluginError):
        raise type(found)(*found.args) from found.__cause__
    _NAMES[found] = name
    return found


@functools.cache
def _load(kind: PluginKind, name: str) -> type[object] | PluginError:
    """The registered class, or why there is none. A failed import is not tried again."""
    point, *others = _entry_points()[KINDS[kind]][name]
    if others:
        owners = " and ".join(f"{each.value} ({_owner(each)})" for each in (point, *others))
        return BrokenPlugin(kind, name, f"it is registered {1 + len(others)} times: {owners}; uninstall all but one")
    try:
        plugin = point.load()
        problem = _problem(kind, plugin)
    except BaseException as error:
        if is_interrupt(error):
            raise
        return _load_error(kind, name, point, error)
    return BrokenPlugin(kind, name, f"{point.value} {problem}") if problem else plugin


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.metadata['Name']} {point.dist.version}" if point.dist is not None else "unknown package"


def _load_error(kind: PluginKind, name: str, point: EntryPoint, error: BaseException) -> PluginError:
    module = point.value.partition(":")[0].strip()
    found: PluginError
    if isinstance(error, ModuleNotFoundError) and error.name and not f"{module}.".startswith(f"{error.name}."):
        found = MissingPackage(kind, name, error.name)
    else:
        reason = f"importing {point.value} of {_owner(point)} raised {type(error).__name__}"
        found = BrokenPlugin(kind, name, reason, str(error))
    found.__cause__ = error
    return found


def _problem(kind: PluginKind, plugin: object) -> str:
    """Why an object is no plugin of a kind; empty where it is one."""
    if not isinstance(plugin, type):
        return f"is {type(plugin).__name__} and not a class"
    absent = [method for method in METHODS[kind] if not callable(getattr(plugin, method, None))]
    if absent:
        return f"has no method {absent[0]!r}, which every {kind} has"
    return declaration_problem(plugin) if kind == "reducer" else ""


_NAMES: dict[type[object], str] = {}
"""The names under which classes were last looked up. A class may have several."""


def name_of(plugin: object) -> str:
    """The registered name of a plugin, by which errors and metrics name it; else the name of its class."""
    found = type(plugin)
    return _NAMES.get(found) or _names_by_value().get(f"{found.__module__}:{found.__qualname__}") or found.__name__


@functools.cache
def _names_by_value() -> dict[str, str]:
    """What entry points load to their names."""
    return {point.value: name for group in _entry_points().values() for name, (point, *_) in group.items()}


def options_of(plugin: type[object]) -> dict[str, dataclasses.Field[Any]]:
    """The options that a plugin class takes: its dataclass fields."""
    return {field.name: field for field in dataclasses.fields(plugin)} if dataclasses.is_dataclass(plugin) else {}


@overload
def create(kind: Literal["reducer"], name: str, /, **options: Any) -> Reducer: ...
@overload
def create(kind: Literal["drafter"], name: str, /, **options: Any) -> Drafter: ...
@overload
def create(kind: Literal["encoder"], name: str, /, **options: Any) -> Encoder: ...
@overload
def create(kind: Literal["family"], name: str, /, **options: Any) -> Family[object]: ...
def create(kind: PluginKind, name: str, /, **options: Any) -> object:
    """Build the plugin `name` with `options`.

    Raises:
        PluginError: As `get`.
        InvalidOption: An option that it does not have, or a value that it refuses.
    """
    plugin = get(kind, name)
    known = options_of(plugin)
    for option in options if dataclasses.is_dataclass(plugin) else ():
        if option not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise InvalidOption(name, option, f"does not exist{nearest(option, list(known))} (options: {allowed})")
    return plugin(**options)


FLAGS = ("needs", "provides", "kinds", "query_aware", "count", "model_types", "rewrites", "trained")
"""Class variables that `describe` shows."""


def describe(kind: PluginKind) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per registered plugin, with what its class declares. Imports the plugins.

    A plugin that cannot be loaded has `unavailable`, the reason, instead of its flags.
    """
    for name in names(kind):
        row: dict[str, Any]
        try:
            row = _description(get(kind, name))
        except PluginError as error:
            row = {"summary": "", "unavailable": reason_of(error), "options": {}}
        yield {"kind": kind, "name": name, **row}


def reason_of(error: PluginError) -> str:
    """Why a plugin cannot be used, in full, for the operator."""
    detail = getattr(error, "detail", "")
    return f"{error}: {detail}" if detail else str(error)


def _description(plugin: type[object]) -> dict[str, Any]:
    row: dict[str, Any] = {"summary": (plugin.__doc__ or "").strip().split("\n")[0]}
    stages: tuple[Stage, ...] | property | None = getattr(plugin, "acts_at", None)
    if isinstance(stages, tuple):
        row["stage"] = stages[0].value
    for flag in FLAGS:
        value = getattr(plugin, flag, None)
        if value is None or callable(value) or isinstance(value, property):
            continue
        row[flag] = _as_json(value)
    row["options"] = {
        option: None if field.default is dataclasses.MISSING else field.default
        for option, field in options_of(plugin).items()
    }
    return row


def _as_json(value: object) -> object:
    return sorted(cast("frozenset[str]", value)) if isinstance(value, frozenset) else value
