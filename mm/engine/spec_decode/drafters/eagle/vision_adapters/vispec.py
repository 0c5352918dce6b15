"""ViSpec: an item becomes one input of the draft layer, and one global feature for the text after it.

Paper     arXiv:2509.15235, section 3.
Equation  queries attend to the item's embeddings once (no positions, no norm). All but the last result are inputs. The
          last is the global feature g, and f' = W [f; g] for text after the item, with W = [1, 0] at first.
Reads     Visual embeddings.
Cost      One softmax over N tokens per prompt; cache and drafting do not depend on N.
Differs   With several items, text is conditioned on the item before it; the authors' code mixes the items up.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import (
    AdapterOutput,
    VisionAdapter,
    VisualContext,
    last_positions,
)


class GlobalFeatureAdapter(VisionAdapter):
    """Compressed visual inputs and a global feature.

    Args:
        num_heads: Heads of the attention that compresses.
        num_rows: Inputs per item.
    """

    def __init__(self, width: int, num_heads: int = 4, num_rows: int = 1) -> None:
        super().__init__(width)
        self.num_heads, self.num_rows = num_heads, num_rows
        head_dim = width // num_heads
        self.queries = nn.Parameter(torch.randn(num_heads, num_rows + 1, head_dim) / head_dim)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.global_projection = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():
            self.global_projection.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    def compress(self, context: VisualContext) -> AdapterOutput:
        if not context.num_items:
            return self.no_tokens(context)
        inputs: list[Tensor] = []
        positions: list[Tensor] = []
        global_features: list[Tensor] = []
        for item in range(context.num_items):
            tokens = context.tokens_of(item)
            pooled = self.pool(context.embeddings[tokens])
            inputs.append(pooled[:-1])
            global_features.append(pooled[-1])
            positions.append(last_positions(context, tokens, self.num_rows))
        return AdapterOutput(
            inputs=torch.cat(inputs), positions=torch.cat(positions), global_features=torch.stack(global_features)
        )

    def pool(self, embeddings: Tensor) -> Tensor:
        """(N, D) to (num_rows + 1, D)."""
        projected: Tensor = self.key_value(embeddings)
        key_value = cast(Tensor, projected.unflatten(-1, (2, self.num_heads, -1)))
        key, value = key_value.permute(1, 2, 0, 3)
        mixed = nn.functional.scaled_dot_product_attention(self.queries.to(key.dtype), key, value)
        return self.out(mixed.transpose(0, 1).flatten(1))

    def condition(self, features: Tensor, global_feature: Tensor | None) -> Tensor:
        global_feature = torch.zeros_like(features) if global_feature is None else global_feature
        return self.global_projection(torch.cat([features, global_feature], dim=-1))
