"""What a language model asks of attention: the interface, its metadata, and the hook into transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mm.engine.kv_cache.blocks import KVCache

ATTENTION = "mm_engine"


Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (R, rotated width) float32."""


@dataclass(kw_only=True)
class AttentionMetadata:
    """Which sequences a layer's rows belong to. Room for them in the cache was made before.

    Attributes:
        slots: (C,) int64, the cache slot of each chunk.
        firsts, counts: (C,) int64, the first row and the number of rows of each chunk.
        masks: Chunk to (count, count) bool: which of the chunk's rows each one sees, itself included. A chunk that is
            not named is causal. All rows see all that was in the cache before.
        places: What a backend worked out from these, once for all layers.
    """

    slots: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    masks: dict[int, Tensor] = field(default_factory=dict)
    places: Any = None

    @classmethod
    def of(
        cls, slots: Sequence[int], counts: Sequence[int], masks: dict[int, Tensor] | None = None
    ) -> AttentionMetadata:
        """Chunks one behind the other."""
        sizes = np.asarray(counts, dtype=np.int64)
        firsts = np.cumsum(sizes) - sizes
        return cls(slots=np.asarray(slots, dtype=np.int64), firsts=firsts, counts=sizes, masks=masks or {})

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())


class Attention(Protocol):
    """A backend over one cache."""

    cache: KVCache

    def attend(self, layer: int, rows: Tensor, batch: AttentionMetadata, rotary: Rotary | None) -> Tensor:
        """Append to the cache and attend.

        Args:
            rows: (R, H + 2 * H_kv, d): queries, keys and values of each row; may be overwritten.
            rotary: Applied to queries and keys; None where that was done already.

        Returns:
            (R, H, d).
        """
        ...


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the halves form (RoFormer, eq. 34), on (R, heads, d).

    The first 2 * w columns are turned, where w is half of the width of `cos`; the rest stays.
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
    mm_batch: AttentionMetadata,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' own layers call: (1, heads, R, d) queries, keys and values, rotated already."""
    rows = torch.cat([query, key, value], dim=1).squeeze(0).transpose(0, 1).contiguous()
    layer: int = module.layer_idx  # type: ignore[assignment]
    return mm_attention.attend(layer, rows, mm_batch, None).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend_in_layer)
