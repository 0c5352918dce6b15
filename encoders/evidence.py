"""What towers observe for reducers, computed from one block's queries and keys.

Only the rows that are wanted: a full attention map would turn off the fused attention, and with it bit equality.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 256
"""Query rows at a time for column means: (heads, 256, P) scores are held."""


def attention_row(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(B, H, P) float32: how much one query attends to each key.

    Args:
        query: (B, H, 1, dh).
        keys: (B, H, P, dh).
    """
    return (query.float() @ keys.float().mT * scale).softmax(dim=-1).squeeze(2)


def mean_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """(B, H, P) float32: how much attention each key receives, averaged over all P queries.

    Args:
        queries, keys: (B, H, P, dh).
    """
    keys = keys.float()
    received = keys.new_zeros(keys.shape[:-1])
    for chunk in queries.split(CHUNK, dim=2):
        received += (chunk.float() @ keys.mT * scale).softmax(dim=-1).sum(dim=2)
    return received / queries.shape[2]


def cell_means(planes: Tensor, height: int, width: int, side: int) -> Tensor:
    """(T, C, height * width) averaged over side x side cells: float32 (T, C, h, w); at a border, over what exists."""
    cells = planes.float().reshape(*planes.shape[:2], height, width)
    return nn.functional.avg_pool2d(cells, side, ceil_mode=True, count_include_pad=False)


def key_means(keys: Tensor) -> Tensor:
    """(B, H, P, dh) keys to (B, dh, P) float32, averaged over heads."""
    return torch.mean(keys.float(), dim=1).mT
