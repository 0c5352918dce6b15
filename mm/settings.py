"""A setting is written down once: a dataclass field that carries its help text, its range and its public name.

From that one line come the range check, the option on the command line, the environment variable, the key in a
configuration file and the keyword argument in Python. This module does not know any setting: see `mm.config`, and
`serve.cli.options` for the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mm.errors import InvalidOption, nearest

T = TypeVar("T")
KEY = "setting"
VARIABLE = "MM_"
"""What the environment variable of a setting begins with."""
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The declaration of a setting; see `setting` for the fields."""

    help: str = ""
    min: float | None = None
    max: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    max_chars: int | None = None
    cli: str | None = None
    flag: str | None = None
    hidden: bool = False
    secret: bool = False
    ray_only: bool = False

    @property
    def allowed(self) -> str:
        """The range in words, such as "above 0 and at most 1"; empty when there is none."""
        if self.min is not None and self.max is not None:
            return f"{self.min:g} to {self.max:g}"
        low = (
            f"above {self.above:g}"
            if self.above is not None
            else f"at least {self.min:g}"
            if self.min is not None
            else ""
        )
        return " and ".join(filter(None, [low, f"at most {self.max:g}" if self.max is not None else ""]))

    def admits(self, value: float) -> bool:
        """Whether a number is in the range. NaN is in no range."""
        if self.allowed and value != value:
            return False
        low = self.min is None or value >= self.min
        return low and (self.max is None or value <= self.max) and (self.above is None or value > self.above)


def setting(
    default: T,
    *,
    help: str,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    max_chars: int | None = None,
    cli: str | None = None,
    flag: str | None = None,
    hidden: bool = False,
    secret: bool = False,
    ray_only: bool = False,
) -> T:
    """A dataclass field that is a setting.

    Args:
        help: One or two sentences for the operator, shown by `--help`.
        min, max: Smallest and largest value that is allowed.
        above: A bound that the value has to exceed.
        choices: The texts that are allowed; not needed where the type is a `Literal`.
        max_chars: Longest text over HTTP; there it cannot be empty either.
        cli: Public name, where it differs from the field's. "frames" makes `--frames`, `MM_FRAMES` and the key
            `frames`.
        flag: A choice that the option stands for: with `cli="lenient"` and `flag="keep_all"` the command line has
            `--lenient` without a value, which sets "keep_all".
        hidden: Whether the command line and HTTP leave it out.
        secret: Whether its value is never printed.
        ray_only: Whether it has no meaning where one process serves without Ray.
    """
    bounds = Bounds(
        help=help,
        min=min,
        max=max,
        above=above,
        choices=choices,
        max_chars=max_chars,
        cli=cli,
        flag=flag,
        hidden=hidden,
        secret=secret,
        ray_only=ray_only,
    )
    return field(default=default, repr=not secret, metadata={KEY: bounds})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a dataclass or of a dataclass inside it.

    Attributes:
        name: Public name, unique among the settings of the outer dataclass.
        path: Field names from the outer dataclass to the field.
        kind: Type of the value, or of each item of a list.
        is_list: Whether it is a tuple of texts.
        is_optional: Whether None is allowed.
    """

    name: str
    path: tuple[str, ...]
    kind: type
    is_list: bool
    is_optional: bool
    default: Any
    bounds: Bounds

    @property
    def field_name(self) -> str:
        return self.path[-1]

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, as the end of a sentence that begins with the setting's name."""
        if value is None and self.is_optional:
            return None
        if self.is_list:
            items = cast("tuple[object, ...]", value) if isinstance(value, list | tuple) else None
            right = items is not None and all(isinstance(item, str) for item in items)
            return None if right else f"was {value!r}; it has to be a list of texts"
        if not _is_kind(value, self.kind):
            return f"was {value!r}; it has to be {', '.join(filter(None, [KINDS[self.kind], self.bounds.allowed]))}"
        if self.bounds.choices and value not in self.bounds.choices:
            return f"was {value!r}; allowed: {', '.join(self.bounds.choices)}"
        if self.kind in (int, float) and not self.bounds.admits(cast(float, value)):
            return f"was {value}; it has to be {self.bounds.allowed}"
        return None

    def from_text(self, text: str) -> Any:
        """The value that a text stands for: of an environment variable, or of an argument written as name=value.

        A list is JSON, or words with spaces between them. "null" leaves an optional setting out.

        Raises:
            ValueError: It is none.
        """
        if self.is_list:
            return [str(item) for item in json.loads(text)] if text.lstrip().startswith("[") else text.split()
        if self.is_optional and text == "null":
            return None
        if self.kind is bool or self.bounds.flag is not None:
            return {"true": True, "false": False}[text.lower()]
        return self.kind(text)

    def value_in(self, config: object) -> Any:
        """The setting's value in an instance of the outer dataclass."""
        return functools.reduce(getattr, self.path, config)


def _is_kind(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@functools.cache
def settings_of(cls: type) -> tuple[Setting, ...]:
    """All settings of a dataclass in the order of its fields, followed by those of the dataclasses inside it."""
    found = tuple(_settings(cls, ()))
    names = [one.name for one in found]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{cls.__name__} has two settings named {', '.join(sorted(repeated))}")
    return found


def _settings(cls: type, path: tuple[str, ...]) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)
    yield from (_setting(one, hints[one.name], path) for one in fields if KEY in one.metadata)
    for name, inner in _inner(cls).items():
        yield from _settings(inner, (*path, name))


def _inner(cls: type) -> dict[str, type]:
    """The fields of a dataclass that hold dataclasses themselves, and their types."""
    hints = get_type_hints(cls)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[one.name])}


def _setting(one: dataclasses.Field[Any], hint: Any, path: tuple[str, ...]) -> Setting:
    bounds: Bounds = one.metadata[KEY]
    is_optional = get_origin(hint) in (Union, types.UnionType)
    if is_optional:
        hint = next(option for option in get_args(hint) if option is not type(None))
    is_list = get_origin(hint) is tuple
    if get_origin(hint) is Literal:
        bounds = dataclasses.replace(bounds, choices=get_args(hint))
    kind = str if is_list or bounds.choices else hint
    return Setting(
        name=bounds.cli or one.name,
        path=(*path, one.name),
        kind=kind,
        is_list=is_list,
        is_optional=is_optional,
        default=one.default,
        bounds=bounds,
    )


def check_settings(config: object, owner: str) -> None:
    """Check the settings of one dataclass; its `__post_init__` calls this.

    Args:
        owner: Named first in the error.

    Raises:
        InvalidOption: A value has the wrong type or is out of range; names it.
    """
    for one in settings_of(type(config)):
        if len(one.path) == 1 and (problem := one.problem(getattr(config, one.field_name))):
            raise InvalidOption(owner, one.field_name, problem)


def build(cls: type[T], values: Mapping[str, Any], owner: str) -> T:
    """A dataclass, and the dataclasses inside it, from values by flat name.

    Args:
        values: Keys are public names of settings, their field names, or fields that hold a dataclass. A whole dataclass
            and single settings of it may be given together.
        owner: Named first in errors.

    Raises:
        InvalidOption: A name is unknown, with the nearest one, or a value cannot be used.
    """
    paths = _paths(cls)
    if unknown := next((name for name in values if name not in paths), None):
        raise InvalidOption(owner, unknown, f"is unknown{nearest(unknown, sorted(paths))}")
    return _built(cls, {paths[name]: value for name, value in values.items()}, None)


def plain_settings(cls: type, values: object, owner: str, *, has_texts: bool = False) -> dict[str, Any]:
    """Settings from plain data, such as a file holds, by public name. Keys may be field names too, with - or _.

    Args:
        owner: Named first in errors.
        has_texts: Whether texts may stand for values of any type, as in arguments written as name=value.

    Raises:
        InvalidOption: It is no mapping, a key is unknown or there twice, or a value cannot be used.
    """
    if not isinstance(values, Mapping):
        raise InvalidOption(owner, "config", "is no file of settings; it has to hold one name and value per line")
    known = settings_of(cls)
    by_key = {one.field_name: one for one in known} | {one.name: one for one in known}
    found: dict[str, Any] = {}
    for key, value in cast("Mapping[object, Any]", values).items():
        name = str(key).replace("-", "_")
        if name not in by_key:
            raise InvalidOption(owner, str(key), f"is unknown{nearest(name, sorted(by_key))}")
        one = by_key[name]
        if has_texts and isinstance(value, str):
            with contextlib.suppress(KeyError, ValueError):  # `problem` says what it has to be
                value = one.from_text(value)
        if one.bounds.flag is not None and isinstance(value, bool):
            value = one.bounds.flag if value else one.default
        if problem := one.problem(value):
            raise InvalidOption(owner, str(key), problem)
        if one.name in found:
            raise InvalidOption(owner, str(key), "is given twice")
        found[one.name] = value
    return found


def environment_settings(cls: type) -> dict[str, str]:
    """Settings of `cls` that environment variables give, as texts by public name."""
    named = {one.name: VARIABLE + one.name.upper() for one in settings_of(cls)}
    return {name: os.environ[variable] for name, variable in named.items() if variable in os.environ}


@functools.cache
def _paths(cls: type) -> dict[str, tuple[str, ...]]:
    """Where each name leads: public names first, then field names, then whole dataclasses."""
    known = settings_of(cls)
    by_field = {one.field_name: one.path for one in reversed(known)}
    return {name: (name,) for name in _inner(cls)} | by_field | {one.name: one.path for one in known}


def _built(cls: type[T], values: Mapping[tuple[str, ...], Any], given: T | None) -> T:
    fields: dict[str, Any] = {path[0]: _frozen(value) for path, value in values.items() if not path[1:]}
    for name, inner in _inner(cls).items():
        if deeper := {path[1:]: value for path, value in values.items() if path[0] == name and path[1:]}:
            fields[name] = _built(inner, deeper, fields.get(name, None if given is None else getattr(given, name)))
    return cls(**fields) if given is None else dataclasses.replace(cast(Any, given), **fields)


def _frozen(value: Any) -> Any:
    """A list as a tuple; any other value as it is."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
