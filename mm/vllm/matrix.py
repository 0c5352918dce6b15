"""What each engine can do with a checkpoint, side by side. Nothing is loaded, vLLM neither."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from mm.engine.interface import NATIVE, EngineCapabilities
from mm.plugins.registry import names
from mm.plugins.spec import build_reducer
from mm.vllm.capabilities import GRID_FAMILIES, LEAST_TEMPERATURE, VLLM

Row = dict[str, str]
"""Engine to "yes", or to why not."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What of a checkpoint decides what an engine can do with it.

    Attributes:
        family: Name of its family.
        num_position_rows: 1, or 3 for M-RoPE.
        has_planes: Whether layers add further planes of visual tokens.
        has_masks: Whether tokens of a prompt attend to later ones.
    """

    family: str
    num_position_rows: int = 1
    has_planes: bool = False
    has_masks: bool = False


def engine_matrix(facts: ModelFacts, reducers: Mapping[str, str]) -> dict[str, Row]:
    """By row: the model, each reducer, each drafter, and each option on which engines differ.

    Args:
        reducers: By name, what they say with the native engine: "yes", or why not.
    """
    model = problem_with_model(VLLM, facts)
    found: dict[str, Row] = {"model": {"native": "yes", "vllm": model or _if_installed()}}
    for name, said in reducers.items():
        why = VLLM.reason_against(build_reducer(name), facts.num_position_rows)
        found[f"reducer {name}"] = {"native": said, "vllm": said if said.startswith("no") or not why else f"no: {why}"}
    for name in names("drafter"):
        if name != "none":
            found[f"drafter {name}"] = {"native": "yes", "vllm": "yes" if VLLM.drafts else "no: it has its own"}
    return found | _options(facts)


def problem_with_model(engine: EngineCapabilities, facts: ModelFacts) -> str:
    """Why the engine cannot answer about media with this checkpoint; empty where it can."""
    if facts.num_position_rows > 1 and not engine.keeps_grid_positions and facts.family not in GRID_FAMILIES:
        return "no: positions in time, height and width, of another family than " + ", ".join(sorted(GRID_FAMILIES))
    if facts.has_planes and not engine.has_planes:
        return "no: layers add further planes of visual tokens"
    if facts.has_masks and not engine.has_masks:
        return "no: tokens of a prompt attend to later ones"
    return ""


def _if_installed() -> str:
    is_there = importlib.util.find_spec("vllm") is not None
    return "yes, where vLLM has the architecture" + ("" if is_there else " (it is not installed here)")


def _options(facts: ModelFacts) -> dict[str, Row]:
    """Options of requests and settings on which the engines differ."""
    is_line = facts.num_position_rows == 1
    kept = "no: it numbers tokens anew" if is_line else "of whole pictures: vLLM computes them from the grids"
    compact = "yes" if is_line else "no: this model has three position axes"
    return {
        "positions kept": {"native": "yes", "vllm": kept},
        "positions compact": dict.fromkeys(("native", "vllm"), "yes")
        if is_line
        else {"native": compact, "vllm": compact},
        "max_visual_tokens": {"native": "yes", "vllm": "yes" if is_line else "no: whole grids only"},
        "temperature": {"native": "0 to 2", "vllm": f"0, and {LEAST_TEMPERATURE:g} to 2"},
        "going on after a lost decoder": {"native": "yes", "vllm": _yes(VLLM.resumes)},
        "prefill of a clip while it is read": {"native": "yes", "vllm": "no: a prompt is computed when it is whole"},
        "quantize int8": {"native": "yes, on a CPU", "vllm": 'no: engine_args {"quantization": ...}'},
        "engine_args": {"native": "no", "vllm": "yes: quantisation, pipeline parallel, its drafters"},
        "n, stop, logprobs, response_format": dict.fromkeys((NATIVE.name, VLLM.name), "yes"),
    }


def _yes(can: bool) -> str:
    return "yes" if can else "no"
