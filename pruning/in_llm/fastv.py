"""FastV: after a few layers, keep the visual tokens that the end of the question attends to.

Paper     arXiv:2403.06764 (ECCV 2024), training-free.      Stage  in_prefill, at the input of layer K.
Needs     attention of the prompt's last row in layer K - 1. Cost   one attention row; no full map.
Equation  s_j = mean_h A[h, last, j] of layer K - 1; keep the half_even(N * keep_ratio) largest s_j, in reading order.
Differs   from the paper's text, which averages received attention over all rows: its code and authors use the last row.
          Each item of a request keeps its share, so that none can lose all its tokens to another; with `joint` all are
          ranked together, as in the authors' code, which knows one item. Layers below K keep every token.
Positions authors: kept; here kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.errors import InvalidOption
from mm.plugins.reducer import PrefillView
from pruning.base import PrefillReducer, bool_option, budget, ratio_option
from pruning.helpers.ranking import keep_best, keep_best_of_items, last_row_scores


@dataclass(frozen=True, kw_only=True)
class FastV(PrefillReducer):
    """Keep what the question attends to (FastV).

    Attributes:
        keep_ratio: Visual tokens kept / visual tokens in, from layer `layer` on.
        layer: The first layer that sees fewer tokens; at least 1.
        joint: Rank the tokens of all items of a request together, instead of giving each item its share.
    """

    keep_ratio: float = 0.5
    layer: int = 2
    joint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option("fastv", "keep_ratio", self.keep_ratio))
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise InvalidOption("fastv", "layer", f"was {self.layer!r}; it has to be a whole number of at least 1")
        bool_option("fastv", "joint", self.joint)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.layer,)

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        scores = last_row_scores(view, layer - 1)
        if self.joint:
            return keep_best(scores, budget(view.visual.shape[0], self.keep_ratio, "half_even"))
        return keep_best_of_items(scores, view, self.keep_ratio, "half_even")
