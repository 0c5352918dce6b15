"""Qwen2-VL and Qwen2.5-VL: tokens between `<|vision_start|>` and `<|vision_end|>`, three-dimensional positions.

M-RoPE gives each row a position in time, height and width. Text counts in all three at once; an item's tokens lie on
their grid behind the text before it, and the text behind it goes on after the longer side of the grid. A prompt's
positions belong to the prompt: no state of the model (transformers' `rope_deltas`) takes part, so requests cannot mix.

One choice shows in clips that reach further in time than in space: text behind them goes on after the longer side of
the grid, as in transformers since 5.3. Its earlier versions, and arXiv:2409.12191, go on after the highest position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed


class Qwen2VL(CheckpointFamily):
    """Decoder side of a Qwen2-VL or Qwen2.5-VL checkpoint: language model, tokenizer, template, splice with M-RoPE.

    Args:
        folder: Checkpoint in Hugging Face format.
        device, dtype: Where and in what the language model lives.
    """

    model_types: ClassVar[frozenset[str]] = frozenset({"qwen2_vl", "qwen2_5_vl"})
    num_position_rows: ClassVar[int] = 3

    def placeholders(self) -> Mapping[int, Kind]:
        return {self.config.image_token_id: "image", self.config.video_token_id: "video"}

    def place(self, tokens: VisualTokens) -> Placed:
        """The (t, h, w) cells of the kept tokens, with Qwen2.5-VL's t in units of clip time."""
        per_second: int | None = getattr(self.config.vision_config, "tokens_per_second", None)
        _, height, width = tokens.grid
        times = time_offsets(tokens, per_second)
        offsets = torch.stack([times[tokens.positions[:, 0].cpu()], *tokens.positions.cpu()[:, 1:].T])
        return Placed(offsets=offsets, advance=max(height, width))


def time_offsets(tokens: VisualTokens, per_second: int | None) -> Tensor:
    """Temporal offset of each step of an item's grid, (t,) int64.

    Qwen2-VL counts steps. Qwen2.5-VL counts `per_second` positions per second of clip time, cut to whole ones; in
    float32, as `get_rope_index` of transformers does, since the cut would show another rounding.
    """
    steps = torch.arange(tokens.grid[0])
    if per_second is None or tokens.seconds_per_step is None:
        return steps
    interval = per_second * torch.tensor(tokens.seconds_per_step, dtype=torch.float32)
    return (steps * interval).long()
