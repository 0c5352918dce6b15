"""Attention as a language model sees it: the interface, its metadata, and what transformers' layers call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mm.data.arrays import IntArray

ATTENTION = "mm_engine"
"""The name under which transformers finds `attend_in_layer`."""

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (T, rotated width) float32."""


def _no_masks() -> dict[int, Tensor]:
    return {}


@dataclass(kw_only=True)
class AttentionMetadata:
    """Which sequence each token of a step belongs to. Its slots in the cache are allocated already.

    The tokens of a step form C chunks: consecutive new tokens of one sequence.

    Attributes:
        seq_indices: (C,) int64, the cache's index of each chunk's sequence.
        query_starts, query_lens: (C,) int64, the first token and the number of tokens of each chunk.
        masks: Chunk to (count, count) bool: which of the chunk's tokens each one attends to, itself included. A chunk
            without a mask is causal. Every token attends to all earlier tokens of its sequence in the cache.
        backend_state: What a backend derived from these fields, once for all layers.
    """

    seq_indices: IntArray
    query_starts: IntArray
    query_lens: IntArray
    masks: dict[int, Tensor] = field(default_factory=_no_masks)
    backend_state: object = None

    @classmethod
    def of(
        cls, seq_indices: Sequence[int], query_lens: Sequence[int], masks: dict[int, Tensor] | None = None
    ) -> AttentionMetadata:
        """Metadata of chunks that follow each other without gaps."""
        lens = np.asarray(query_lens, dtype=np.int64)
        return cls(
            seq_indices=np.asarray(seq_indices, dtype=np.int64),
            query_starts=np.cumsum(lens) - lens,
            query_lens=lens,
            masks=masks or {},
        )

    @property
    def num_query_tokens(self) -> int:
        return int(self.query_lens.sum())


class Attention(Protocol):
    """What a decoder layer calls; see `mm.engine.attention` for the backends."""

    def attend(self, layer: int, qkv: Tensor, metadata: AttentionMetadata, rotary: Rotary | None) -> Tensor:
        """Write keys and values to the cache, and attend.

        Args:
            qkv: (T, H + 2 * H_kv, d): queries, keys and values of each token. May be overwritten.
            rotary: Applied to queries and keys. None where that was done already.

        Returns:
            (T, H, d).
        """
        ...


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the halves form (RoFormer, eq. 34), on (T, heads, d).

    The first 2 * w columns are rotated, where w is half of the width of `cos`. The other columns stay.
    """
    width = cos.shape[-1]
    turned = states[..., :width].float()
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    turned = (turned * cos[:, None] + half * sin[:, None]).to(states.dtype)
    return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], dim=-1)


def attend_in_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mm_attention: Attention,
    mm_metadata: AttentionMetadata,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention for transformers' own layers: queries, keys and values are (1, heads, T, d) and rotated already."""
    qkv = torch.cat([query, key, value], dim=1).squeeze(0).transpose(0, 1).contiguous()
    layer = cast(int, module.layer_idx)
    return mm_attention.attend(layer, qkv, mm_metadata, None).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend_in_layer)  # pyright: ignore[reportUnknownMemberType]
