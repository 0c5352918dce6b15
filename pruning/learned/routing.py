"""The router's network: a score for each group of neighbouring tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RouterNetwork(nn.Module):
    """Groups of projected tokens to a score, higher = keep all of the group.

    Args:
        width: D.
        hidden: Width of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm_mean, self.norm_spread = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(2 * width + 1, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, groups: Tensor) -> Tensor:
        """(..., g, D) tokens of groups to (...,) scores."""
        mean = groups.mean(-2)
        return self.score(mean, (groups - mean[..., None, :]).abs().mean(-2))

    def score(self, mean: Tensor, spread: Tensor) -> Tensor:
        """(...,) scores of means (..., D) and mean absolute distances from them (..., D)."""
        # The norm takes the size of the spread away, and it matters: the rule without training reads nothing else.
        size = spread.mean(-1, keepdim=True).add(1e-6).log()
        return self.mlp(torch.cat([self.norm_mean(mean), self.norm_spread(spread), size], dim=-1))[..., 0]
