"""Native: the checkpoint's own way to make fewer tokens.

Stage     pixels, before patches are made: the tower, its memory and everything after it cost less.
Needs     resolution: a checkpoint whose processor has such a way: an area that pictures have at most (Qwen's and GLM's
          `size`, `max_pixels`), a number of tokens (Gemma 4's `max_soft_tokens`), or another way to join patches
          (MiniCPM-V's `downsample_mode`, VideoLLaMA 3's `use_token_compression`).
Cost      none; pictures are resized once more.
Equation  of an item that the processor would bring to h x w pixels, at most keep_ratio h w pixels are kept, at its own
          aspect ratio and in whole cells. So at most keep_ratio of its tokens are made. Of the other settings the one
          is taken that makes most tokens of those that make few enough; where none does, the request is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm.data.media import Kind
from mm.data.tokens import Grid
from mm.plugins.features import RESOLUTION
from mm.plugins.reducer import Stage
from pruning.base import BaseReducer, ratio_option


@dataclass(frozen=True, kw_only=True)
class Native(BaseReducer):
    """Make fewer tokens by the checkpoint's own means, such as a lower resolution.

    Attributes:
        keep_ratio: Tokens made / tokens that would be made, at most, in (0, 1]. The token counts of an answer begin
            after it: what is made is what came in.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PIXELS,)
    needs: ClassVar[frozenset[str]] = frozenset({RESOLUTION})
    keep_ratio: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option("native", "keep_ratio", self.keep_ratio))

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """All of what the checkpoint made."""
        return num_tokens

    def resolution(self) -> float:
        """See `mm.plugins.reducer.OnPixels`."""
        return self.keep_ratio
