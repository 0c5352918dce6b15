"""Visual tokens of one item, and the prompt that they become part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mm.data.media import Kind

Positions = Literal["kept", "compact"]


Grid = tuple[int, int, int]
"""Tokens along time, height and width: (t, h, w). An image has t = 1, or one step per crop of it."""


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """Visual tokens of one item, as the decoder would receive them.

    Attributes:
        embeddings: (N, D) in the model's dtype.
        positions: (N, 3) int64, each token's (t, h, w) cell in `grid`, in ascending raster order; a merged
            token has its anchor's.
        sizes: (N,) float32, how many original tokens each one stands for.
        grid: Cells of the unreduced item; N = t * h * w before reduction.
        kind: "image" or "video".
        aux_features: What the tower observed, by name; per token where the last axis is N; dropped after reduction.
        seconds_per_step: Clip time between two steps along t; None for an image, or where the family does not ask.
        crops: Rows and columns of crops where the steps of an image are its crops, row by row, and then the whole
            image at the crops' size; None where the grid is the image's own.
        protected: (N,) bool, tokens that reducers inside the decoder have to keep; None protects none.
    """

    embeddings: Tensor
    positions: Tensor
    sizes: Tensor
    grid: Grid
    kind: Kind
    aux_features: Mapping[str, Tensor] = field(default_factory=dict)
    seconds_per_step: float | None = None
    crops: tuple[int, int] | None = None
    protected: Tensor | None = None

    @classmethod
    def full(
        cls,
        embeddings: Tensor,
        grid: Grid,
        kind: Kind,
        aux_features: Mapping[str, Tensor] | None = None,
        seconds_per_step: float | None = None,
        crops: tuple[int, int] | None = None,
    ) -> VisualTokens:
        """Unreduced tokens of `embeddings` (t*h*w, D) in raster order."""
        t, h, w = grid
        if embeddings.shape[0] != t * h * w:
            raise ValueError(f"{embeddings.shape[0]} embeddings do not fill a grid of {grid}")
        axes = [torch.arange(n, device=embeddings.device) for n in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        sizes = torch.ones(t * h * w, device=embeddings.device)
        return cls(
            embeddings=embeddings,
            positions=positions,
            sizes=sizes,
            grid=grid,
            kind=kind,
            aux_features=aux_features or {},
            seconds_per_step=seconds_per_step,
            crops=crops,
        )

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def num_tokens_in(self) -> int:
        """Tokens before any reduction."""
        t, h, w = self.grid
        return t * h * w

    @property
    def indices(self) -> Tensor:
        """(N,) int64: each token's raster index in the unreduced grid."""
        _, h, w = self.grid
        return (self.positions[:, 0] * h + self.positions[:, 1]) * w + self.positions[:, 2]

    def without_aux_features(self) -> VisualTokens:
        return replace(self, aux_features={})


@dataclass(frozen=True, kw_only=True)
class EncodeTimings:
    """Seconds of one item's stages in the encoder. A cache hit has zeros for what it skipped."""

    load_s: float = 0.0
    encode_s: float = 0.0
    reduce_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One media item, ready to be spliced into a prompt: what travels from encoder to decoder.

    Attributes:
        tokens: What is left of the item's tokens.
        timings: Seconds of each stage for this item.
        cache_hit: Whether the feature cache held the tokens.
        key: Names what the tokens depend on: content, encoder, reducer, tenant. Empty for tokens nobody may share.
        fault: Why the reducer's work is missing, in a text for users. Empty when nothing went wrong.
        num_media_bytes: Size of the item's encoded file. 0 for pixels that were in memory.
    """

    tokens: VisualTokens
    timings: EncodeTimings = field(default_factory=EncodeTimings)
    cache_hit: bool = False
    key: str = ""
    fault: str = ""
    num_media_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class EncodedMedia:
    """All media of one request as the encoder leaves them: what every runtime hands to the decoder.

    Attributes:
        items: One `Encoded` per media item of the request, in order.
        reducer: Canonical text of the request's reducer, with the stages that act inside the decoder.
    """

    items: tuple[Encoded, ...] = ()
    reducer: str = "none"

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_cache_hits(self) -> int:
        """Items that the feature cache held."""
        return sum(item.cache_hit for item in self.items)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the decoder's first layer receives.

    Attributes:
        token_ids: (L,) int64; visual rows hold the placeholder id.
        embeddings: (L, D).
        positions: (P, L) int64 with P = 1, or 3 for M-RoPE: the positions of the unreduced prompt at the kept rows,
            unless they were made compact.
        next_position: The position of the first generated token: where text behind the unreduced prompt goes on. With
            M-RoPE a clip may have reached further in time.
        is_visual: (L,) bool.
    """

    token_ids: Tensor
    embeddings: Tensor
    positions: Tensor
    next_position: int
    is_visual: Tensor

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    def compact(self) -> Prompt:
        """The same rows at positions 0, 1, 2, ...; only where positions have one row."""
        assert self.positions.shape[0] == 1, "counting through positions in time, height and width loses the grid"
        positions = torch.arange(self.length, device=self.positions.device).unsqueeze(0)
        return replace(self, positions=positions, next_position=self.length)
