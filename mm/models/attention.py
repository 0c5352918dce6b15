"""Attention as a language model sees it: the interface, its metadata, and what transformers' layers call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mm.data.arrays import IntArray
from mm.errors import MmError

ATTENTION = "mm_engine"
"""The name under which transformers finds `attend_in_layer`."""

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (T, rotated width) float32."""


@dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """How the attention of one layer differs from softmax(q k^T / sqrt(d)) v over all earlier tokens.

    Attributes:
        scale: Factor of the products q k^T. None is 1 / sqrt(d).
        window: Tokens that a token sees, itself included: it and those just before it. None is all of them.
        softcap: c of c * tanh(score / c), which bounds the scores. None leaves them as they are.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


PLAIN = AttentionVariant()


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
        windowed_masks: The same, for layers with a window only.
        layer_inputs: (T, layers, d), what each layer gets beside hidden states; None in most models.
        shared: Keys and values that layers leave for later ones, as transformers names them.
        backend_state: What a backend derived from these fields, once for all layers.
    """

    seq_indices: IntArray
    query_starts: IntArray
    query_lens: IntArray
    masks: dict[int, Tensor] = field(default_factory=_no_masks)
    windowed_masks: dict[int, Tensor] = field(default_factory=_no_masks)
    layer_inputs: Tensor | None = None
    shared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    backend_state: object = None

    @functools.cached_property
    def in_windows(self) -> AttentionMetadata:
        """What layers with a window attend by."""
        if not self.windowed_masks:
            return self
        return replace(self, masks=self.masks | self.windowed_masks, windowed_masks={}, backend_state=None)

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

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        metadata: AttentionMetadata,
        rotary: Rotary | None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        """Write keys and values to the cache, and attend.

        Args:
            qkv: (T, H + 2 * H_kv, d): queries, keys and values of each token. May be overwritten.
            rotary: Applied to queries and keys. None where that was done already.
            variant: How this layer attends. A window counts tokens that the cache holds, whatever was dropped before.

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


HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "output_attentions", "use_cache", "sliding_window"})
"""Arguments of transformers' attention that need nothing: dropout is 0, and windows come from the configuration."""


class UnknownAttention(MmError):
    """A layer's attention takes arguments that change its result in a way that we do not have."""

    code = "bad_checkpoint"

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(arguments)
        self.arguments = arguments

    def __str__(self) -> str:
        return f"attention with {', '.join(self.arguments)} cannot be computed here"


class AttentionInputs(Exception):
    """Queries and keys of a layer. Raised to end the layer as soon as its attention has them.

    Attributes:
        queries: (T, H, d), rotated.
        keys: (T, H_kv, d), rotated.
    """

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.queries, self.keys = query[0].transpose(0, 1), key[0].transpose(0, 1)


class _Recorder:
    def attend(
        self,
        layer: int,
        qkv: Tensor,
        metadata: AttentionMetadata,
        rotary: Rotary | None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        raise AssertionError("only `attend_in_layer` knows queries and keys apart")


RECORDER = _Recorder()
"""Given to a layer in place of an attention, it makes the layer raise `AttentionInputs`."""


def attend_in_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mm_attention: Attention,
    mm_metadata: AttentionMetadata,
    mm_layer: int,
    mm_window: int | None = None,
    mm_shape: tuple[int, int] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention for transformers' own layers: queries, keys and values are (1, heads, T, d) and rotated already.

    Args:
        mm_layer: The layer's place in the cache.
        mm_window: The layer's sliding window.
        mm_shape: Heads and width that the cache has for keys and values, where the layer has fewer.

    Raises:
        UnknownAttention: The layer asks for arithmetic that no backend of ours has.
    """
    if mm_attention is RECORDER:
        raise AttentionInputs(query, key)
    unknown = sorted(name for name, value in kwargs.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise UnknownAttention(unknown)
    width = query.shape[-1]
    if mm_shape is not None:
        query, key, value = _fitted(query, key, value, mm_shape)
    qkv = torch.cat([query, key, value], dim=1).squeeze(0).transpose(0, 1).contiguous()
    variant = AttentionVariant(scale=scaling, window=mm_window, softcap=softcap)
    return mm_attention.attend(mm_layer, qkv, mm_metadata, None, variant)[..., :width].unsqueeze(0), None


def _fitted(query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer with fewer or narrower heads than the cache, which give the same sums."""
    heads, width = shape
    wider = (0, width - query.shape[-1])
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    return nn.functional.pad(query, wider), nn.functional.pad(key, wider), nn.functional.pad(value, wider)


AttentionInterface.register(ATTENTION, attend_in_layer)  # pyright: ignore[reportUnknownMemberType]
