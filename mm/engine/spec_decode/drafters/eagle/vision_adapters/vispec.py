"""ViSpec: an item becomes one draft row, and one vector that every text row behind it is told.

Paper     arXiv:2509.15235, section 3.
Equation  queries attend to the item's embeddings once (no positions, no norm); all but the last result are rows, the
          last is the global vector g, and f' = W [f; g] for text rows behind the item, W = [1, 0] at first.
Reads     Visual embeddings.
Cost      One softmax over N tokens per prompt; cache and drafting do not depend on N.
Differs   With several items, text is told of the item before it; the authors' code mixes the items up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import (
    SeenRows,
    VisionAdapter,
    VisualContext,
    last_positions,
)


class OneRowAndGlobal(VisionAdapter):
    """Compressed visual rows and a global feature.

    Args:
        num_heads: Of the attention that compresses.
        num_rows: Rows an item becomes.
    """

    def __init__(self, width: int, num_heads: int = 4, num_rows: int = 1) -> None:
        super().__init__(width)
        self.num_heads, self.num_rows = num_heads, num_rows
        head_dim = width // num_heads
        self.queries = nn.Parameter(torch.randn(num_heads, num_rows + 1, head_dim) / head_dim)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.told = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():
            self.told.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    def look(self, sight: VisualContext) -> SeenRows:
        if not sight.num_items:
            return self.no_rows(sight)
        rows, positions, told = [], [], []
        for item in range(sight.num_items):
            at = sight.of_item(item)
            seen = self.compress(sight.embeddings[at])
            rows.append(seen[:-1])
            told.append(seen[-1])
            positions.append(last_positions(sight, at, self.num_rows))
        return SeenRows(inputs=torch.cat(rows), positions=torch.cat(positions), told=torch.stack(told))

    def compress(self, embeddings: Tensor) -> Tensor:
        """(N, D) to (num_rows + 1, D)."""
        split = self.key_value(embeddings).unflatten(-1, (2, self.num_heads, -1))
        key, value = split.permute(1, 2, 0, 3)
        mixed = nn.functional.scaled_dot_product_attention(self.queries.to(key.dtype), key, value)
        return self.out(mixed.transpose(0, 1).flatten(1))

    def tell(self, features: Tensor, told: Tensor | None) -> Tensor:
        told = torch.zeros_like(features) if told is None else told
        return self.told(torch.cat([features, told], dim=-1))
