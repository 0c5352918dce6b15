"""What vLLM's engine can do with a model, as far as it is known without loading it."""

from __future__ import annotations

from mm.config import ModelConfig
from mm.engine.interface import USE_NATIVE, EngineCapabilities
from mm.errors import IncompatiblePlugin, InvalidOption
from mm.models.family import CheckpointFamily
from mm.plugins.registry import name_of
from mm.plugins.spec import configured_reducer

VLLM = EngineCapabilities(
    name="vllm",
    stages=frozenset(),
    positions=frozenset({"compact"}),
    keeps_grid_positions=False,
    trains_layers=False,
    drafts=False,
    has_planes=False,
    has_masks=False,
    resumes=False,
)
"""It numbers the embeddings of a prompt 0, 1, 2, ..., and treats those of models with M-RoPE like text."""

GRID_FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Families with M-RoPE whose items vLLM takes with their grids, from which it computes their positions itself."""

LEAST_TEMPERATURE = 0.01
"""Above 0. vLLM raises lower ones to it."""


def takes_grids(family: CheckpointFamily) -> bool:
    """Whether items go to vLLM with their grids.

    Raises:
        IncompatiblePlugin: The family has positions that vLLM would get wrong.
    """
    if family.num_position_rows == 1:
        return False
    name = name_of(family)
    if name not in GRID_FAMILIES:
        known = ", ".join(sorted(GRID_FAMILIES))
        missing = f"positions of visual tokens in time, height and width of other families than {known}; {USE_NATIVE}"
        raise IncompatiblePlugin(f"the family {name}", "the engine vllm", [missing])
    return True


def check_settings(config: ModelConfig) -> None:
    """Refuse settings that only the native engine has.

    Raises:
        InvalidOption: Names the first of them.
    """
    refused: dict[str, tuple[bool, str]] = {
        "quantize": (config.quantize != "none", 'give engine_args {"quantization": ...}'),
    }
    for name, (is_given, advice) in refused.items():
        if is_given:
            raise InvalidOption("model", name, f"belongs to the native engine; for vLLM {advice}")
    for drafter in config.speculation.offered:
        if problem := VLLM.problem_with_drafter(drafter):
            name = "drafter" if drafter == config.speculation.drafter else "drafters"
            raise InvalidOption("model", name, f'{problem}; vLLM\'s own: engine_args {{"speculative_config": ...}}')


def check_reducer(config: ModelConfig, num_position_rows: int = 1) -> None:
    """Refuse a default reducer that the engine cannot run.

    Raises:
        InvalidOption: Says what to do.
    """
    if problem := VLLM.problem_with_reducer(configured_reducer(config).plugin, num_position_rows):
        raise InvalidOption("model", "reducer", f"was {config.reducer!r}: {problem}")
