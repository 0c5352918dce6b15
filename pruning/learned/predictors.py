"""The two predictors of Dynamic-LLaVA: which visual tokens, and which generated tokens, later tokens may attend to.

Class 0 of their logits means keep. demos/train/sparse.py trains them; the module names are those of the stored tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PredictorShape:
    """Of both predictors, and where they stand.

    Attributes:
        width: D of the decoder.
        channels: c of the paper: 512 of 4,096 there.
        num_heads, num_blocks: Of the image predictor.
        image_layer: At its input visual tokens are decided on.
        text_layer: At its input generated tokens are.
        keep_first: So many generated tokens are kept whatever the predictor says: short answers stay whole.
    """

    width: int
    channels: int
    num_heads: int = 4
    num_blocks: int = 2
    image_layer: int = 0
    text_layer: int = 1
    keep_first: int = 6


class Block(nn.Module):
    """Pre-norm attention among all tokens, then an MLP."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, c) to (..., N, c)."""
        num_tokens, channels = x.shape[-2:]
        split = self.qkv(self.norm1(x)).view(*x.shape[:-1], 3, self.num_heads, channels // self.num_heads)
        query, key, value = split.movedim(-3, 0).transpose(-3, -2)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(-3, -2).reshape(*x.shape[:-2], num_tokens, channels))
        return x + self.mlp(self.norm2(x))


class ImagePredictor(nn.Module):
    """Hidden states (..., N, D) of the visual tokens of one item to logits (..., N, 2)."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.down = _down(shape)
        self.blocks = nn.ModuleList([Block(shape.channels, shape.num_heads) for _ in range(shape.num_blocks)])
        self.head = _head(shape.channels)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.down(hidden)
        for block in self.blocks:
            x = block(x)
        own, shared = x.chunk(2, dim=-1)
        return self.head(torch.cat([own, shared.mean(-2, keepdim=True).expand_as(shared)], dim=-1))


class TextPredictor(nn.Module):
    """Hidden states (..., D), each token alone, to logits (..., 2)."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.down = _down(shape)
        self.head = _head(shape.channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.down(hidden))


class Predictors(nn.Module):
    """Both predictors. Their weights start at 1 / sqrt(inputs), and the last bias near keeping everything."""

    def __init__(self, shape: PredictorShape, *, keep_bias: float = 2.0) -> None:
        super().__init__()
        self.shape, self.image, self.text = shape, ImagePredictor(shape), TextPredictor(shape)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias) if module.bias is not None else None  # pyright: ignore[reportUnnecessaryComparison]
        with torch.no_grad():
            for head in (self.image.head, self.text.head):
                last = head[-1]
                assert isinstance(last, nn.Linear)
                last.bias[0] = keep_bias


def _down(shape: PredictorShape) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.channels), nn.GELU())


def _head(channels: int) -> nn.Sequential:
    half, quarter = channels // 2, channels // 4
    return nn.Sequential(
        nn.Linear(channels, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
    )
