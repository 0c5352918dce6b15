"""The layer inputs of observations that a trained drafter has not read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.engine.spec_decode.drafters.eagle.feature_rows import TextFeatures
from mm.engine.spec_decode.drafters.eagle.head import DraftHead
from mm.engine.spec_decode.drafters.eagle.tree_builder import EagleSession


@dataclass(eq=False)
class PendingInputs:
    """What the steps since the last draft add to one session.

    Attributes:
        seq_index: Index in the drafter's cache.
        visual: (n, D), inputs of the layer for a prompt's visual tokens, which come before the text.
        states, token_ids: Of text, part by part: (k, F) and (k,).
        global_features: Of text, part by part: (k, D), the global feature of the item before each token, or None.
        positions: Of all inputs, part by part.
    """

    session: EagleSession
    seq_index: int
    visual: Tensor | None = None
    states: list[Tensor] = field(default_factory=list[Tensor])
    token_ids: list[Tensor] = field(default_factory=list[Tensor])
    global_features: list[Tensor | None] = field(default_factory=list["Tensor | None"])
    positions: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, features: TextFeatures, global_feature: Tensor | None) -> None:
        """Add a part of text."""
        self.states.append(features.states)
        self.token_ids.append(features.token_ids)
        self.global_features.append(global_feature)
        self.positions.append(features.positions)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.positions))

    @property
    def num_text_tokens(self) -> int:
        return sum(map(len, self.token_ids))


def layer_inputs(network: DraftHead, pending: Sequence[PendingInputs]) -> Tensor:
    """(T, D): the inputs of all sessions. The text of all of them is embedded at once."""
    features = network.features(concatenated([states for one in pending for states in one.states]))
    global_feature = None
    if any(part is not None for one in pending for part in one.global_features):
        nothing = features.new_zeros(1, features.shape[1])
        pairs = [pair for one in pending for pair in zip(one.global_features, one.token_ids, strict=True)]
        global_feature = concatenated([nothing.expand(len(ids), -1) if part is None else part for part, ids in pairs])
    token_ids = concatenated([ids for one in pending for ids in one.token_ids])
    text = network.inputs(network.vision_adapter.condition(features, global_feature), token_ids)
    if all(one.visual is None for one in pending):
        return text
    texts = torch.split(text, [one.num_text_tokens for one in pending])
    parts = zip(pending, texts, strict=True)
    return torch.cat([part for one, own in parts for part in (one.visual, own) if part is not None])


def features_before(global_features: Tensor | None, items: Tensor) -> Tensor | None:
    """(k, D): the global feature of the item before each token, and zeros before the first item.

    Args:
        global_features: (num_items, D), or None.
        items: (k,) int64, the item before each token.
    """
    if global_features is None:
        return None
    return torch.cat([torch.zeros_like(global_features[:1]), global_features])[items + 1]


def concatenated(parts: list[Tensor]) -> Tensor:
    """All parts in one tensor, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
