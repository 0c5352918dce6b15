"""Dynamic-LLaVA: a learned decision about each visual token in prefill, and about each generated token in decode.

Paper     arXiv:2412.00876 (ICLR 2025). Trained by demos/train/train_dynamic.py.
Stages    in_prefill, at the input of the weights' `image_layer`; per_token, at that of `text_layer`.
Equation  Prefill: of an item, the floor(N * keep_ratio) visual tokens with the largest log softmax(f_img(h))_0 stay.
          Decode: a generated token is kept iff f_out(h)_0 - f_out(h)_1 > text_threshold, or it is one of the first
          `keep_first`.
Cost      The image predictor on the visual tokens once; the text predictor, a small MLP, on each generated token.
Differs   from the public code: it pads shorter rows of the cache with zeros, to which later tokens attend, and keeps
          the start of the answer on the model object. Here a dropped token holds no memory, and each sequence has its
          own state. The first `keep_first` tokens of an answer are kept. The weights say which media are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.errors import InvalidOption
from mm.plugins.reducer import PrefillView, Stage
from mm.plugins.weights import ReducerWeights
from pruning.base import budget, number_option, ratio_option, top_k_ascending
from pruning.learned.base import LearnedReducer, started
from pruning.learned.predictors import Predictors, PredictorShape

MEDIA: tuple[Kind, ...] = ("image", "video")

KEEPS_ALL = -1e9
"""A threshold that every token is above."""


@dataclass(frozen=True, kw_only=True)
class Dynamic(LearnedReducer):
    """Drop visual tokens in prefill and generated tokens in decode, as trained predictors say (Dynamic-LLaVA).

    Attributes:
        keep_ratio: Visual tokens kept / visual tokens in, of each item. What the weights were trained for if not given.
        text_keep_ratio: Generated tokens kept / all, on average over long answers as measured for the weights; 1 keeps
            all. An answer may have more or fewer: the content decides.
        text_threshold: In place of `text_keep_ratio`: a generated token is kept if its score for keeping is so much
            larger than that for dropping. Higher drops more. That of the weights if neither is given.
    """

    name: ClassVar[str] = "dynamic"
    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_PREFILL, Stage.PER_TOKEN)
    weights: str = "dynamic"
    keep_ratio: float | None = None
    text_keep_ratio: float | None = None
    text_threshold: float | None = None

    def __post_init__(self) -> None:
        for option in ("keep_ratio", "text_keep_ratio"):
            if (value := getattr(self, option)) is not None:
                object.__setattr__(self, option, ratio_option(self.name, option, value))
        if self.text_threshold is not None:
            number = number_option(self.name, "text_threshold", self.text_threshold, KEEPS_ALL, -KEEPS_ALL)
            object.__setattr__(self, "text_threshold", number)
            if self.text_keep_ratio is not None:
                raise InvalidOption(self.name, "text_threshold", "takes the place of text_keep_ratio; give one of them")

    @classmethod
    def untrained(cls, width: int) -> ReducerWeights:
        shape = PredictorShape(width=width, channels=max(8, width // 8))
        card = {"reducer": cls.name, **asdict(shape), "image_keep_ratio": 0.22, "text_threshold": 0.0}
        card |= {"media": ["image"], "text_kept_at": [[0.3, 0.5], [0.9, -2.0]]}
        return started(card, cls.build)

    @staticmethod
    def build(weights: ReducerWeights) -> Predictors:
        media: object = weights.card.get("media")
        if not isinstance(media, list) or not all(kind in MEDIA for kind in cast("list[object]", media)):
            raise weights.bad(f"have a card whose 'media' is {media!r} and not a list of: {', '.join(MEDIA)}")
        least = {"image_layer": 0, "text_layer": 0, "keep_first": 0}
        shape = PredictorShape(
            **{name: weights.count(name, least.get(name, 1)) for name in PredictorShape.__annotations__}
        )
        if shape.channels % shape.num_heads or shape.channels < 8:
            raise weights.bad(f"have a card whose channels ({shape.channels}) do not suit {shape.num_heads} heads")
        return Predictors(shape)

    def resolve(self, weights: ReducerWeights) -> Mapping[str, Any]:
        threshold = self.text_threshold
        if self.text_keep_ratio is not None:
            threshold = self._threshold_for(self.text_keep_ratio, weights)
        elif threshold is None:
            threshold = weights.number("text_threshold")
        keep_ratio = weights.number("image_keep_ratio") if self.keep_ratio is None else self.keep_ratio
        keep_ratio = ratio_option(self.name, "keep_ratio", keep_ratio)
        return {"keep_ratio": keep_ratio, "text_keep_ratio": None, "text_threshold": threshold}

    def _threshold_for(self, ratio: float, weights: ReducerWeights) -> float:
        """The threshold at which so many generated tokens were kept, between the measured ones by a straight line."""
        if ratio == 1:
            return KEEPS_ALL
        points = sorted(weights.numbers("text_kept_at", 2))
        for (low, above), (high, below) in pairwise(points):
            if low <= ratio <= high:
                return above + (below - above) * (ratio - low) / (high - low)
        measured = f"{points[0][0]:g} to {points[-1][0]:g}" if points else "nothing"
        message = f"was {ratio:g}; these weights were measured from {measured}, and 1 keeps all; or give text_threshold"
        raise InvalidOption(self.name, "text_keep_ratio", message)

    @property
    def predictors(self) -> Predictors:
        return cast(Predictors, self.network)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.predictors.shape.image_layer,)

    @torch.no_grad()
    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        assert self.keep_ratio is not None
        assert self.loaded is not None
        kept: list[Tensor] = []
        for item, kind in enumerate(view.item_kinds):
            mine = (view.items == item).nonzero().flatten()
            k = budget(len(mine), self.keep_ratio, "floor")
            if kind in self.loaded.card["media"] and 0 < k < len(mine):
                logits = self.predictors.image(view.hidden[view.visual[mine]].float())
                mine = mine[top_k_ascending(logits.log_softmax(-1)[:, 0], k)]
            kept.append(mine)
        return torch.cat(kept)

    def token_layer(self, num_layers: int) -> int:
        return self.predictors.shape.text_layer

    @torch.no_grad()
    def keep_tokens(self, hidden: Tensor, indices: Tensor) -> Tensor:
        assert self.text_threshold is not None
        logits = self.predictors.text(hidden.float())
        is_early = indices < self.predictors.shape.keep_first
        return is_early | (logits[:, 0] - logits[:, 1] > self.text_threshold)
