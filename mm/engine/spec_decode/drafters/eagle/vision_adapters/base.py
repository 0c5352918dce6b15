"""What a way of seeing is given, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class VisualContext:
    """Visual tokens of one prompt, as encoder and reducer left them, and what the target made of them.

    Attributes:
        embeddings: (V, D), what the target's first layer received, in order of the prompt.
        positions: (V,) int64, their positions in the unreduced prompt.
        items: (V,) int64, which item each belongs to: 0, 1, ...
        features: (V, D), the target's last hidden states on them; rows of NaN where there is none, because the token
            was dropped inside the decoder or came from a cached prefix. None where nobody asks for them.
        question: (Q, D), last hidden states of the text behind the last item; may be empty.
    """

    embeddings: Tensor
    positions: Tensor
    items: Tensor
    question: Tensor
    features: Tensor | None = None

    @property
    def num_items(self) -> int:
        return int(self.items[-1]) + 1 if len(self.items) else 0

    def of_item(self, item: int) -> Tensor:
        """(n,) int64: an item's rows."""
        return (self.items == item).nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class SeenRows:
    """Draft rows that stand for visual tokens.

    Attributes:
        inputs: (n, D), inputs of the draft layer.
        positions: (n,) int64.
        told: (num_items, D), what text rows behind each item are told; None where they are told nothing.
    """

    inputs: Tensor
    positions: Tensor
    told: Tensor | None = None


class VisionAdapter(nn.Module):
    """Base of the ways of seeing.

    Attributes:
        reads_features: Whether `look` uses `VisualContext.features`.
    """

    reads_features: bool = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def look(self, sight: VisualContext) -> SeenRows:
        """Draft rows for a prompt's visual tokens."""
        raise NotImplementedError

    def tell(self, features: Tensor, told: Tensor | None) -> Tensor:
        """(n, D) features of text rows, changed by what the item before each of them has told.

        Args:
            told: (n, D), zeros for rows before the first item; None where `look` gave None.
        """
        return features

    def no_rows(self, sight: VisualContext) -> SeenRows:
        empty = sight.embeddings.new_empty(0, self.width)
        return SeenRows(inputs=empty, positions=sight.positions.new_empty(0))


def last_positions(sight: VisualContext, rows: Tensor, count: int) -> Tensor:
    """(count,) int64: where compressed rows of an item stand, the last places of its span as draft rows count them.

    Args:
        rows: The item's rows.
    """
    end = int(sight.positions[rows[-1]])
    return torch.arange(end - count, end, device=rows.device)
