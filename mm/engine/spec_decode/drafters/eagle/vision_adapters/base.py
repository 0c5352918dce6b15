"""What a vision adapter reads, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class VisualContext:
    """Visual tokens of one prompt after encoder and reducer, and what the target computed of them.

    Attributes:
        embeddings: (V, D), inputs of the target's first layer, in order of the prompt.
        positions: (V,) int64, positions in the unreduced prompt.
        items: (V,) int64, the item that each token belongs to: 0, 1, ...
        features: (V, D), the target's last hidden states. Tokens without one are NaN: they were dropped inside the
            decoder, or came from a cached prefix. None where no adapter reads them.
        question: (Q, D), last hidden states of the text after the last item. It may be empty.
    """

    embeddings: Tensor
    positions: Tensor
    items: Tensor
    question: Tensor
    features: Tensor | None = None

    @property
    def num_items(self) -> int:
        return int(self.items[-1]) + 1 if len(self.items) else 0

    def tokens_of(self, item: int) -> Tensor:
        """(n,) int64: indices of an item's tokens."""
        return (self.items == item).nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class AdapterOutput:
    """Inputs of the draft layer that stand for visual tokens.

    Attributes:
        inputs: (n, D).
        positions: (n,) int64.
        global_features: (num_items, D), one vector per item that conditions the text after it. None without any.
    """

    inputs: Tensor
    positions: Tensor
    global_features: Tensor | None = None


class VisionAdapter(nn.Module):
    """Base class of the adapters.

    Attributes:
        reads_features: Whether `compress` reads `VisualContext.features`.
    """

    reads_features: bool = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def compress(self, context: VisualContext) -> AdapterOutput:
        """Inputs of the draft layer for a prompt's visual tokens."""
        raise NotImplementedError

    def condition(self, features: Tensor, global_feature: Tensor | None) -> Tensor:
        """(n, D) features of text, conditioned on the item before each.

        Args:
            features: (n, D).
            global_feature: (n, D), zeros for text before the first item. None where `compress` gave none.
        """
        return features

    def no_tokens(self, context: VisualContext) -> AdapterOutput:
        """An output in which nothing stands for the visual tokens."""
        empty = context.embeddings.new_empty(0, self.width)
        return AdapterOutput(inputs=empty, positions=context.positions.new_empty(0))


def last_positions(context: VisualContext, tokens: Tensor, count: int) -> Tensor:
    """(count,) int64: positions of an item's compressed inputs, the last ones of its span, one before the token's own.

    Args:
        tokens: Indices of the item's tokens.
    """
    end = int(context.positions[tokens[-1]])
    return torch.arange(end - count, end, device=tokens.device)
