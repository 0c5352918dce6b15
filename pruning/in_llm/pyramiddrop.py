"""PyramidDrop: drop a share of the visual tokens again and again, the deeper the layer the fewer are left.

Paper     arXiv:2410.17247 (CVPR 2025), training-free here.  Stage  in_prefill, at the input of several layers.
Needs     attention of the prompt's last row in the layer about to run.  Cost  one attention row per stage, and that
          layer's keys once more; no full map.
Equation  of an item's N tokens stage i = 1..S keeps floor(N * keep_ratio^(i/S)), those with the largest
          s_j = mean_h A[h, last, j]; the ratio is of the original N, not of what the stage before left.
Positions authors: counted anew after each stage (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code: key heads are shared as the model shares them, and each item of a prompt has its own
          quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mm.data.tokens import PublishedPositions
from mm.errors import InvalidOption
from mm.plugins.reducer import PrefillView
from pruning.base import PrefillReducer, int_option, ratio_option
from pruning.helpers.ranking import keep_best_of_items, last_row_scores, layers_option, spread


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(PrefillReducer):
    """Fewer visual tokens at each of several depths (PyramidDrop).

    Attributes:
        keep_ratio: Visual tokens left after the last stage / visual tokens in; the stages before fall to it in equal
            steps of a ratio: 0.125 in three stages is 0.5, 0.25, 0.125.
        num_stages: How often tokens are dropped.
        at_layers: At whose inputs, one per stage; empty spreads the stages evenly over the decoder.
    """

    published_positions: ClassVar[PublishedPositions] = "renumbered"
    keep_ratio: float = 0.125
    num_stages: int = 3
    at_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option("pyramiddrop", "keep_ratio", self.keep_ratio))
        object.__setattr__(self, "num_stages", int_option("pyramiddrop", "num_stages", self.num_stages, 1, 64))
        object.__setattr__(self, "at_layers", layers_option("pyramiddrop", "at_layers", self.at_layers))
        if self.at_layers and len(self.at_layers) != self.num_stages:
            message = f"names {len(self.at_layers)} layers for {self.num_stages} stages; one each is needed"
            raise InvalidOption("pyramiddrop", "at_layers", message)

    def ratio(self, stage: int) -> float:
        """Tokens kept / tokens in after `stage`, counted from 1."""
        return round(self.keep_ratio ** (stage / self.num_stages), 12)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return self.at_layers or spread("pyramiddrop", "num_stages", self.num_stages, num_layers)

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        ratio = self.ratio(1 + self.layers(view.num_layers).index(layer))
        return keep_best_of_items(last_row_scores(view, layer), view, ratio, "floor")
