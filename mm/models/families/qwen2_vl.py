"""Qwen2-VL and Qwen2.5-VL: tokens between `<|vision_start|>` and `<|vision_end|>`, three-dimensional positions.

M-RoPE gives each token a position in time, height and width. For text all three are equal. An item's tokens have the
positions of their grid, added to the position after the text before it. Positions are part of the prompt, not state of
the model as transformers' `rope_deltas` are, so requests cannot mix.

The text after an item goes on after the item's highest position, in time, height or width: arXiv:2409.12191, section
2.1, and the authors' code, with which the models were trained. In transformers since 5.3 it goes on after the longer
side of the grid instead, so that a clip of many steps shares positions with the text after it; `text_after_clip`
chooses. Pictures are the same either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed


class _Config(Protocol):
    image_token_id: int
    video_token_id: int
    vision_config: object


class Qwen2VL(CheckpointFamily):
    """The decoder side of a Qwen2-VL or Qwen2.5-VL checkpoint, with M-RoPE positions."""

    model_types: ClassVar[frozenset[str]] = frozenset({"qwen2_vl", "qwen2_5_vl"})
    num_position_rows: int = 3

    def placeholders(self) -> Mapping[int, Kind]:
        config = cast(_Config, self.config)
        return {config.image_token_id: "image", config.video_token_id: "video"}

    def place(self, tokens: VisualTokens) -> Placed:
        """The (t, h, w) grid cells of the kept tokens. In Qwen2.5-VL, t counts clip time."""
        per_second: int | None = getattr(cast(_Config, self.config).vision_config, "tokens_per_second", None)
        _, height, width = tokens.grid
        times = time_offsets(tokens, per_second)
        offsets = torch.stack([times[tokens.positions[:, 0].cpu()], *tokens.positions.cpu()[:, 1:].T])
        advance = max(height, width)
        if self.text_after_clip == "highest" and len(times):
            advance = max(advance, int(times[-1]) + 1)
        return Placed(offsets=offsets, advance=advance)


def time_offsets(tokens: VisualTokens, per_second: int | None) -> Tensor:
    """(t,) int64: the temporal position of each time step of an item's grid.

    Qwen2-VL counts steps. Qwen2.5-VL counts `per_second` positions per second of clip time, rounded down. This is done
    in float32, as in `get_rope_index` of transformers: another dtype could round to another position.

    Args:
        per_second: Positions per second. None for Qwen2-VL.
    """
    steps = torch.arange(tokens.grid[0])
    if per_second is None or tokens.seconds_per_step is None:
        return steps
    interval = per_second * torch.tensor(tokens.seconds_per_step, dtype=torch.float32)
    return (steps * interval).long()
