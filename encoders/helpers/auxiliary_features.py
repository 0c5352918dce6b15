"""What towers observe for reducers, computed from one block's queries and keys.

Only the needed part of the attention map is computed. Asking a tower for the full map would turn off its fused
attention, and its outputs would no longer be bit-equal.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, cast

import torch
from torch import Tensor, nn

from mm.plugins.features import ATTENTION_RECEIVED, CLS_ATTENTION, TOWER_KEYS

CHUNK = 256
"""Queries per step of `mean_attention`, which holds (heads, 256, P) scores."""


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


def observed_in_block(block: nn.Module, hidden: Tensor, names: Set[str], has_cls: bool) -> dict[str, Tensor]:
    """The named features (B, ..., P) float32 of a block as in CLIP, SigLIP and Idefics3, from its input (B, P, D)."""
    modules = cast(Any, block)
    attention, states = modules.self_attn, modules.layer_norm1(hidden)
    keys = attention.k_proj(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    found = {TOWER_KEYS: key_means(keys)} if TOWER_KEYS in names else {}
    wanted = names & {CLS_ATTENTION, ATTENTION_RECEIVED}
    if wanted:
        sources = states[:, :1] if has_cls else states
        queries = attention.q_proj(sources).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        received = (attention_row if has_cls else mean_attention)(queries, keys, attention.scale)
        found |= dict.fromkeys(wanted, received)
    return found
