"""The reducers that the page offers, with their options, and the specification of a choice."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm.config import ModelConfig, SpeculationLimits
from mm.errors import PluginError
from mm.models.checkpoint import find
from mm.plugins.registry import describe, get, names

DEFAULT_REDUCER = "divprune"
NO_CHOICE = frozenset({"none", "pipeline"})
"""`none` is the other side of the comparison; a pipeline is written out: `a:keep_ratio=0.5 + b:keep_ratio=0.5`."""

DEFAULT_DRAFTER = "flash"
SHOWN = 6
"""Drafted tokens per step on a page that offers all drafters."""
BUDGET = "keep_ratio"
ENTRY = re.compile(r"^\s{4,8}(\w+(?:, \w+)*): (.*(?:\n\s{9,}\S.*)*)", re.MULTILINE)
"""One entry of a docstring's list of attributes, its continued lines included."""


@dataclass(frozen=True, kw_only=True)
class ReducerChoice:
    """A reducer to choose.

    Attributes:
        stage: Where it acts; a `mm.plugins.reducer.Stage`.
        kinds: Media that it reduces.
        options: Name to default, as its dataclass has them.
        help: Option to what it means, where that is written.
    """

    name: str
    summary: str = ""
    stage: str = "pre_llm"
    kinds: tuple[str, ...] = ("image", "video")
    options: dict[str, Any] = field(default_factory=dict)
    help: dict[str, str] = field(default_factory=dict)

    @property
    def has_keep_ratio(self) -> bool:
        return BUDGET in self.options

    @property
    def other_options(self) -> dict[str, Any]:
        """The options beside the budget."""
        return {name: value for name, value in self.options.items() if name != BUDGET}


def installed_reducers() -> tuple[ReducerChoice, ...]:
    """The reducers of this installation, which are those of its server too."""
    return tuple(
        ReducerChoice(
            name=row["name"],
            summary=row["summary"],
            stage=row["stage"],
            kinds=tuple(row.get("kinds", ("image", "video"))),
            options=row["options"],
            help=option_help(get("reducer", row["name"])),
        )
        for row in describe("reducer")
        if row["name"] not in NO_CHOICE and "unavailable" not in row
    )


def option_help(plugin: type) -> dict[str, str]:
    """What the docstrings of a plugin and its bases say about each of its options."""
    found: dict[str, str] = {}
    for owner in reversed(plugin.__mro__):
        if dataclasses.is_dataclass(owner):
            for name_list, text in ENTRY.findall(owner.__doc__ or ""):
                found |= dict.fromkeys(name_list.split(", "), " ".join(text.split()))
    return found


def reducer_spec(
    reducer: str, keep_ratio: float, options: Mapping[str, Any], choices: Sequence[ReducerChoice]
) -> tuple[str, float | None]:
    """The specification to send, and the budget beside it.

    A specification written out by hand goes as it is; whether it is right is for the server to say. Without one the
    server chooses a reducer for the budget.

    Args:
        options: What was put in for the chosen reducer's other options; those at their default are left out.
    """
    choice = next((choice for choice in choices if choice.name == reducer.strip()), None)
    if not reducer.strip():
        return "", round(float(keep_ratio), 4)
    if choice is None:
        return reducer.strip(), None
    changed = {
        name: written(options[name])
        for name, default in choice.other_options.items()
        if name in options and written(options[name]) not in ("", written(default))
    }
    tail = ",".join(f"{name}={value}" for name, value in changed.items())
    budget = round(float(keep_ratio), 4) if choice.has_keep_ratio else None
    return (f"{choice.name}:{tail}" if tail else choice.name), budget


def written(value: object) -> str:
    """A value as a specification has it; a list also where only its items were written, nothing as nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = "".join(value.split())
        return f"[{text}]" if "," in text and not text.startswith("[") else text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, separators=(",", ":"))


def with_drafters(config: ModelConfig) -> ModelConfig:
    """The model with every drafter that its folder brings, and those that need no training.

    All that they draft is verified, so that it can be seen; elsewhere cost decides. What the operator chose stays as
    it is.
    """
    if config.speculation != SpeculationLimits():
        return config
    folder = find(config.model) / "drafters"
    trained = [name for name in names("drafter") if (weights := _weights(name)) and (folder / weights).is_dir()]
    free = ["copy", "recycle", "copy + recycle"]
    default = next((name for name in [DEFAULT_DRAFTER, *trained] if name in trained), free[-1])
    limits = SpeculationLimits(drafter=default, drafters=(*trained, *free), max_draft_tokens=SHOWN, control=False)
    return dataclasses.replace(config, speculation=limits)


def _weights(drafter: str) -> str | None:
    """The folder that a trained drafter looks for; None for one that is broken, or needs no weights."""
    try:
        plugin = get("drafter", drafter)
    except PluginError:
        return None
    return getattr(plugin, "weights", None) if getattr(plugin, "trained", False) is True else None
