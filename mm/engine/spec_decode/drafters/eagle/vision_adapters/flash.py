"""FLASH: learned queries gather an item's visual rows out of the target's hidden states.

Paper     SpecFLASH, arXiv:2505.12728 (latent-aware compression).
Equation  z = softmax(A H^T) H with learned A (C, D) and the target's last hidden states H (N, D); no projections.
Reads     Features of visual rows. Rows without one (dropped inside the decoder, cached prefix) are left out; an item
          with none gives no rows.
Cost      C rows per item; one softmax over N tokens per prompt.
Differs   The scores are divided by sqrt(D), without which a random start is one-hot.
"""

from __future__ import annotations

import torch
from torch import nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import (
    SeenRows,
    VisionAdapter,
    VisualContext,
    last_positions,
)


class LatentQueries(VisionAdapter):
    """Query-pooled hidden states of the visual rows.

    Args:
        num_rows: Rows an item becomes, at most as many as it has.
    """

    reads_features = True

    def __init__(self, width: int, num_rows: int = 16) -> None:
        super().__init__(width)
        self.num_rows = num_rows
        self.queries = nn.Parameter(torch.randn(num_rows, width))

    def look(self, sight: VisualContext) -> SeenRows:
        assert sight.features is not None
        inputs, positions = [], []
        known = ~sight.features[:, 0].isnan()
        for item in range(sight.num_items):
            rows = sight.of_item(item)
            hidden = sight.features[rows[known[rows]]]
            if not len(hidden):
                continue
            queries = self.queries[: len(hidden)].to(hidden.dtype)
            inputs.append((queries @ hidden.T * self.width**-0.5).softmax(-1) @ hidden)
            positions.append(last_positions(sight, rows, len(queries)))
        if not inputs:
            return self.no_rows(sight)
        return SeenRows(inputs=torch.cat(inputs), positions=torch.cat(positions))
