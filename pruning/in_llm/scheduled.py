"""Scheduled: how many visual tokens each layer sees is written down, which ones the end of the question decides.

Paper     arXiv:2412.00556 ("Accelerating Multimodal LLMs by Searching Optimal Vision Token Reduction", CVPR 2025),
          training-free; `mm tune` searches schedules.       Stage  in_prefill, at the input of the layers named.
Needs     attention of the prompt's last row in the layer before.  Cost  one attention row per layer named; no full map.
Equation  at the input of layer l the half_even(N * r_l) tokens with the largest s_j = mean_h A[h, last, j] of layer
          l - 1 stay, N being what entered the decoder; r falls with l, since what is dropped does not come back.
Positions here kept; the paper does not say.
Differs   from the paper: each item of a request keeps its share, so that none can lose all its tokens to another; with
          `joint` all are ranked together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.errors import InvalidOption
from mm.plugins.reducer import PrefillView
from pruning.base import PrefillReducer, bool_option, budget, ratio_option
from pruning.helpers.ranking import keep_best, keep_best_of_items, last_row_scores, layers_option


@dataclass(frozen=True, kw_only=True)
class Scheduled(PrefillReducer):
    """A share of the visual tokens per layer, ranked by the last row's attention (what `mm tune` finds).

    Attributes:
        keep_ratios: Visual tokens kept / visual tokens in, from each of `at_layers` on; never rising.
        at_layers: At whose inputs tokens are dropped, ascending.
        joint: Rank the tokens of all items of a request together, instead of giving each item its share.
    """

    keep_ratios: tuple[float, ...] = (0.5, 0.25)
    at_layers: tuple[int, ...] = (1, 2)
    joint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_layers", layers_option("scheduled", "at_layers", self.at_layers))
        bool_option("scheduled", "joint", self.joint)
        given = self.keep_ratios if isinstance(self.keep_ratios, list | tuple) else (self.keep_ratios,)
        ratios = tuple(ratio_option("scheduled", "keep_ratios", ratio) for ratio in given)
        object.__setattr__(self, "keep_ratios", ratios)
        if not ratios or len(ratios) != len(self.at_layers):
            message = f"has {len(ratios)} ratios for {len(self.at_layers)} layers; one each is needed"
            raise InvalidOption("scheduled", "keep_ratios", message)
        if list(ratios) != sorted(ratios, reverse=True):
            raise InvalidOption("scheduled", "keep_ratios", f"may not rise from layer to layer, got {list(ratios)}")

    @property
    def keep_ratio(self) -> float:
        """What is left after the last layer named."""
        return self.keep_ratios[-1]

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return self.at_layers

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        ratio = self.keep_ratios[self.at_layers.index(layer)]
        scores = last_row_scores(view, layer - 1)
        if self.joint:
            return keep_best(scores, budget(sum(view.item_sizes), ratio, "half_even"))
        return keep_best_of_items(scores, view, ratio, "half_even")
