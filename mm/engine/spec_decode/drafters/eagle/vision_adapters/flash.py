"""FLASH: learned queries pool an item's visual tokens from the target's hidden states.

Paper     SpecFLASH, arXiv:2505.12728 (latent-aware compression).
Equation  z = softmax(A H^T) H with learned A (C, D) and the target's last hidden states H (N, D); no projections.
Reads     Features of visual tokens. Tokens without one (dropped inside the decoder, cached prefix) are left out; an
          item without any gives no inputs.
Cost      C inputs per item; one softmax over N tokens per prompt.
Differs   The scores are divided by sqrt(D), without which a random start is one-hot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import (
    AdapterOutput,
    VisionAdapter,
    VisualContext,
    last_positions,
)


class LatentQueries(VisionAdapter):
    """Query-pooled hidden states of the visual tokens.

    Args:
        num_rows: Inputs per item, at most as many as it has tokens.
    """

    reads_features = True

    def __init__(self, width: int, num_rows: int = 16) -> None:
        super().__init__(width)
        self.num_rows = num_rows
        self.queries = nn.Parameter(torch.randn(num_rows, width))

    def compress(self, context: VisualContext) -> AdapterOutput:
        assert context.features is not None
        inputs: list[Tensor] = []
        positions: list[Tensor] = []
        known = ~context.features[:, 0].isnan()
        for item in range(context.num_items):
            tokens = context.tokens_of(item)
            hidden = context.features[tokens[known[tokens]]]
            if not len(hidden):
                continue
            queries = self.queries[: len(hidden)].to(hidden.dtype)
            inputs.append((queries @ hidden.T * self.width**-0.5).softmax(-1) @ hidden)
            positions.append(last_positions(context, tokens, len(queries)))
        if not inputs:
            return self.no_tokens(context)
        return AdapterOutput(inputs=torch.cat(inputs), positions=torch.cat(positions))
