"""The text form of reducers and drafters, and what it means.

    spec   = part (" + " part)*
    part   = name [":" option "=" value ("," option "=" value)*]
    value  = JSON, or a plain word

Several reducers make a pipeline, several drafters a hybrid. `reducer_spec` and `drafter_spec` parse a text, build the
plugin and derive its canonical form. They do so once per distinct text and keep the result, so a request that names a
known text costs one look-up. They load the plugins that the text names, and no others.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, cast

from mm.config import ModelConfig
from mm.errors import BrokenPlugin, InvalidOption, MmError
from mm.plugins import registry, weights
from mm.plugins.capabilities import (
    Capabilities,
    acts_outside_decoder,
    capabilities_of,
    decoder_weights,
    is_trained,
    parts_of,
)
from mm.plugins.drafter import Drafter
from mm.plugins.reducer import Learned, Reducer
from mm.plugins.registry import PluginKind, create, get, options_of
from mm.plugins.threads import is_interrupt

CACHED_SPECS = 512
"""Distinct texts that are remembered, of reducers and of drafters each. Clients choose the texts: hence the bound."""

COMMA = re.compile(r",(?![^\[]*\])")
"""Between options, not inside a list."""

OptionValue = bool | int | float | str | list["OptionValue"] | dict[str, "OptionValue"] | None
"""JSON."""

RATIO_REDUCER = "divprune"
"""The reducer that a `keep_ratio` without a reducer means. It needs nothing of an encoder but its tokens, and reduces
images and clips, so it works with every model."""

PluginT = TypeVar("PluginT", Reducer, Drafter)


class Part(NamedTuple):
    """One plugin that a text names, with its options as they are written."""

    name: str
    options: Mapping[str, OptionValue]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec(Generic[PluginT]):
    """What a text means. One object per distinct text, shared by all requests that give it.

    Attributes:
        text: As it was given.
        parts: The plugins it names, in order.
        canonical: One text per distinct configuration: every option written out, in order of name. For cache keys,
            metrics and answers. Parses to an equal plugin.
        plugin: The plugin that was built; immutable.
    """

    text: str
    parts: tuple[Part, ...]
    canonical: str
    plugin: PluginT


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducerSpec(Spec[Reducer]):
    """What a reducer's text means.

    Attributes:
        before_decoder: Canonical text of the parts that act before the decoder, "none" where there are none. Encoded
            features depend on it and not on the rest.
        capabilities: What the reducer does and needs.
    """

    before_decoder: str
    capabilities: Capabilities


def parse_spec(text: str) -> tuple[Part, ...]:
    """The parts of a text, in order. Loads no plugin.

    Raises:
        InvalidOption: The text does not follow the grammar.
    """
    return tuple(_parse_part(part.strip(), text) for part in text.split("+"))


def _parse_part(part: str, text: str) -> Part:
    name, _, tail = part.partition(":")
    options: dict[str, OptionValue] = {}
    for item in filter(None, (piece.strip() for piece in COMMA.split(tail))):
        option, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not option or not value:
            raise InvalidOption(name or text, item, "is not of the form option=value")
        if option in options:
            raise InvalidOption(name, option, "is given twice")
        options[option] = _value(value)
    if not name.strip():
        raise InvalidOption(text, "name", "is missing; write name:option=value, joined by ' + '")
    return Part(name.strip(), options)


def _value(text: str) -> OptionValue:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def reducer_spec(text: str, keep_ratio: float | None = None) -> ReducerSpec:
    """The reducer, or the pipeline of several, that `text` describes.

    Args:
        keep_ratio: Replaces the option of that name. Only for a text that names one reducer.

    Raises:
        PluginError: A name is unknown or its plugin is broken, or an option is wrong.
    """
    return _reducer_spec(text, keep_ratio)


def reducer_or_default(named: str | None, default: str, keep_ratio: float | None = None) -> ReducerSpec:
    """The reducer that a name and a ratio mean, each of which may be absent.

    A ratio alone is given to `default` if that is one reducer with such an option, and to `RATIO_REDUCER` otherwise.

    Args:
        named: None takes the default.

    Raises:
        PluginError: As `reducer_spec`.
    """
    if named is None and keep_ratio is not None and not _takes_ratio(parse_spec(default)):
        named = RATIO_REDUCER
    return reducer_spec(default if named is None else named, keep_ratio)


def configured_reducer(config: ModelConfig) -> ReducerSpec:
    """The reducer of requests that name none.

    Raises:
        PluginError: As `reducer_spec`.
    """
    return reducer_or_default(None if config.reducer == "none" else config.reducer, "none", config.keep_ratio)


@functools.lru_cache(maxsize=CACHED_SPECS, typed=True)
def _reducer_spec(text: str, keep_ratio: float | None) -> ReducerSpec:
    parts = parse_spec(text)
    if keep_ratio is not None:
        parts = _with_keep_ratio(parts, text, keep_ratio)
    reducers: list[Reducer] = []
    written: list[str] = []
    for part in parts:
        with _errors_of("reducer", part.name):
            reducers.append(create("reducer", part.name, **part.options))
            written.append(_written(part.name, reducers[-1]))
    return _assemble(text, parts, reducers, written)


def _assemble(text: str, parts: tuple[Part, ...], reducers: list[Reducer], written: list[str]) -> ReducerSpec:
    """The meaning of a text whose parts are built."""
    plugin = reducers[0] if len(reducers) == 1 else create("reducer", "pipeline", stages=tuple(reducers))
    with _errors_of("reducer", text):
        capabilities = capabilities_of(plugin)
        outside = [acts_outside_decoder(reducer) for reducer in reducers]
    return ReducerSpec(
        text=text,
        parts=parts,
        canonical=" + ".join(written),
        plugin=plugin,
        before_decoder=" + ".join(itertools.compress(written, outside)) or "none",
        capabilities=capabilities,
    )


def _with_keep_ratio(parts: tuple[Part, ...], text: str, keep_ratio: float) -> tuple[Part, ...]:
    part, *others = parts
    if others:
        raise InvalidOption(text, "keep_ratio", "is ambiguous for several reducers; write it inside the specification")
    if not _takes_ratio(parts):
        hint = f"name another, or leave the name out, which takes {RATIO_REDUCER}"
        raise InvalidOption(part.name, "keep_ratio", f"does not exist: this reducer has no such budget; {hint}")
    return (Part(part.name, {**part.options, "keep_ratio": keep_ratio}),)


def _takes_ratio(parts: tuple[Part, ...]) -> bool:
    return len(parts) == 1 and "keep_ratio" in options_of(get("reducer", parts[0].name))


def bind(spec: ReducerSpec, model: Path | None, device: str = "cpu") -> ReducerSpec:
    """`spec` with the weights of its learned reducers. Their fingerprints are part of its canonical text.

    A text without learned reducers costs nothing here, and weights are found once per text.

    Args:
        model: The checkpoint's folder; None where an encoder belongs to none.
        device: Where the reducers' networks compute.

    Raises:
        BadWeights: Weights are absent, damaged, or were trained for another checkpoint.
        InvalidOption: An option asks for what the weights cannot do, or two parts have a decoder of their own.
    """
    return _bound(spec.canonical, model, device) if spec.capabilities.trained else spec


@functools.lru_cache(maxsize=CACHED_SPECS)
def _bound(text: str, model: Path | None, device: str) -> ReducerSpec:
    spec = _reducer_spec(text, None)
    reducers: list[Reducer] = []
    written: list[str] = []
    for part, reducer in zip(spec.parts, parts_of(spec.plugin), strict=True):
        if is_trained(reducer):
            learned = cast(Learned, reducer)
            found = weights.find_weights(part.name, learned.weights, model, device)
            with _errors_of("reducer", part.name):
                reducer = learned.bind(found)
        reducers.append(reducer)
        written.append(_written(part.name, reducer))
    bound = _assemble(text, spec.parts, reducers, written)
    decoder_weights(bound.plugin)
    return bound


@functools.lru_cache(maxsize=CACHED_SPECS)
def drafter_spec(text: str) -> Spec[Drafter]:
    """The drafter, or the hybrid of several, that `text` describes.

    Raises:
        PluginError: As `reducer_spec`.
    """
    parts = parse_spec(text)
    drafters: list[Drafter] = []
    written: list[str] = []
    for part in parts:
        with _errors_of("drafter", part.name):
            drafters.append(create("drafter", part.name, **part.options))
            written.append(_written(part.name, drafters[-1]))
    plugin = drafters[0] if len(drafters) == 1 else create("drafter", "hybrid", stages=tuple(drafters))
    return Spec(text=text, parts=parts, canonical=" + ".join(written), plugin=plugin)


@contextlib.contextmanager
def _errors_of(kind: PluginKind, name: str) -> Generator[None]:
    """Make what a plugin's own code raises while it is built an error that names the plugin."""
    try:
        yield
    except MmError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        reason = f"building it raised {type(error).__name__}"
        raise BrokenPlugin(kind, name, reason, str(error)) from error


def _written(name: str, plugin: object) -> str:
    """Canonical text of one part, from the built plugin: constructors convert values, such as 1 to 1.0."""
    options = sorted(options_of(type(plugin)))
    tail = ",".join(f"{option}={json.dumps(getattr(plugin, option), separators=(',', ':'))}" for option in options)
    return f"{name}:{tail}" if tail else name


def refresh() -> None:
    """Forget built plugins and read the installed distributions again."""
    registry.refresh()
    _reducer_spec.cache_clear()
    _bound.cache_clear()
    weights.forget()
    drafter_spec.cache_clear()


def build_reducer(text: str, keep_ratio: float | None = None) -> Reducer:
    """The plugin of `reducer_spec`."""
    return reducer_spec(text, keep_ratio).plugin


def build_drafter(text: str) -> Drafter:
    """The plugin of `drafter_spec`."""
    return drafter_spec(text).plugin
