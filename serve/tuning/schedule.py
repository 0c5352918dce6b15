"""A schedule: the share of the visual tokens that each decoder layer gets, its cost, and its specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Schedule = tuple[float, ...]
"""Tokens kept / tokens in, layer by layer from layer 0, where it is always 1; never rising."""

STEP = 1e-4
"""Ratios are written in four decimals."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a prefill costs in a decoder.

    Attributes:
        width, inner_width: Of the residual stream and of the gated MLP.
        query_width, key_width: Of all query heads and of all key heads.
        num_visual, num_text: Tokens of a prompt, on average.
    """

    num_layers: int
    width: int
    inner_width: int
    query_width: int
    key_width: int
    num_visual: float
    num_text: float

    @classmethod
    def of(cls, config: PretrainedConfig, head_dim: int, num_visual: float, num_text: float) -> Shape:
        """Of a text model's configuration."""
        text = cast(Any, config)  # the fields are those of the architecture
        return cls(
            num_layers=text.num_hidden_layers,
            width=text.hidden_size,
            inner_width=text.intermediate_size,
            query_width=text.num_attention_heads * head_dim,
            key_width=text.num_key_value_heads * head_dim,
            num_visual=num_visual,
            num_text=num_text,
        )

    def layer_flops(self, keep_ratio: float) -> float:
        """FLOPs of one layer's prefill: projections, scores and sums of attention, and the MLP's three products."""
        tokens = self.num_text + self.num_visual * keep_ratio
        projections = 2 * tokens * self.width * (self.query_width + self.key_width)
        attention = 2 * tokens**2 * self.query_width
        return 2 * (projections + attention + 3 * tokens * self.width * self.inner_width)

    def flop_share(self, schedule: Sequence[float]) -> float:
        """FLOPs of a prefill by the schedule / FLOPs with every token in every layer."""
        return sum(map(self.layer_flops, schedule)) / (self.num_layers * self.layer_flops(1.0))


def spec_of(schedule: Sequence[float]) -> str:
    """The reducer that applies the schedule; it names only the layers that drop tokens."""
    layers = [at for at in range(1, len(schedule)) if schedule[at] < schedule[at - 1]]
    if not layers:
        return "none"
    ratios = ",".join(f"{schedule[layer]:g}" for layer in layers)
    return f"scheduled:at_layers=[{','.join(map(str, layers))}],keep_ratios=[{ratios}]"


def written(ratio: float) -> float:
    """The ratio in the decimals of a specification, at least one step. It is rounded down, except within the last tenth
    of a step, so that a ratio just below 1 becomes 1.
    """
    return max(STEP, round(math.floor(ratio / STEP + 0.1) * STEP, 4))
