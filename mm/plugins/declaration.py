"""Checks what the class of a reducer declares: its stages, and the methods that follow from them."""

from __future__ import annotations

from typing import cast

from mm.plugins.reducer import Stage

METHODS: dict[Stage, tuple[str, ...]] = {
    Stage.PIXELS: ("plan", "resolution"),
    Stage.BEFORE_VIT: ("plan", "keep_cells"),
    Stage.IN_VIT: ("plan", "merges", "match"),
    Stage.TEMPORAL: ("plan", "after_encode"),
    Stage.PRE_LLM: ("plan", "after_encode"),
    Stage.IN_PREFILL: ("layers", "in_prefill"),
    Stage.IN_DECODE: ("prefill_done",),
    Stage.PER_TOKEN: ("token_layer", "keep_tokens"),
}
"""The methods that a reducer has for each stage where it acts."""

HOOKS = {
    Stage.PIXELS: "resolution",
    Stage.BEFORE_VIT: "keep_cells",
    Stage.PRE_LLM: "after_encode",
    Stage.IN_PREFILL: "in_prefill",
    Stage.IN_DECODE: "prefill_done",
    Stage.PER_TOKEN: "keep_tokens",
}
"""Methods that no reducer has without the stage: a forgotten declaration is an error, not a method that never runs."""


def declaration_problem(plugin: type[object]) -> str:
    """What is wrong with the declaration of a reducer's class; empty where nothing is.

    A pipeline derives its stages from its parts, by a property, which cannot be checked on the class.
    """
    declared: object = getattr(plugin, "acts_at", None)
    if isinstance(declared, property):
        return ""
    named = cast("tuple[object, ...]", declared) if isinstance(declared, tuple) else ()
    stages = [stage for stage in named if isinstance(stage, Stage)]
    if not stages or len(stages) < len(named):
        return f"has to declare acts_at as a tuple of stages, not {declared!r}"
    absent = [flag for flag in ("needs", "query_aware", "count") if not hasattr(plugin, flag)]
    if absent:
        return f"does not declare {absent[0]!r}"
    if stages != [stage for stage in Stage if stage in stages]:
        return "has to name its stages in acts_at once each, in the order of mm.plugins.reducer.Stage"
    return _method_problem(plugin, stages)


def _method_problem(plugin: type[object], stages: list[Stage]) -> str:
    """A stage without its methods, or a method whose stage is not declared and which would never be called."""
    for stage in stages:
        for method in METHODS[stage]:
            if not callable(getattr(plugin, method, None)):
                return f"acts at {stage.value} and has no method {method!r}"
    called = {method for stage in stages for method in METHODS[stage]}
    for stage, method in HOOKS.items():
        if method not in called and callable(getattr(plugin, method, None)):
            return f"has the method {method!r}, but does not declare that it acts at {stage.value}"
    return ""
