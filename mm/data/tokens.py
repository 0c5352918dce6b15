"""Visual tokens of one item, and the prompt that they become part of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mm.data.media import Kind

Positions = Literal["kept", "compact"]
"""Whether tokens that a reducer keeps have their positions of the unreduced prompt, or are numbered anew."""

PublishedPositions = Literal["kept", "compact", "renumbered"]
"""What a method's authors did: as `Positions`, or numbered anew in every layer in which tokens are dropped."""

AskedPositions = Literal["kept", "compact", "as_published"]
"""What a request may ask for; "as_published" is what the authors of its reducer did."""

Grid = tuple[int, int, int]
"""Tokens along time, height and width: (t, h, w). An image has t = 1, or one step per crop of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Positions of an item's tokens that do not follow from its grid. Only for models with one row of positions.

    Attributes:
        offsets: (N,) int64 on the CPU, ascending, counted from the item's first position.
        advance: Position of what follows the item.
    """

    offsets: Tensor
    advance: int

    def take(self, keep: Tensor) -> Placement:
        """The positions of some of the tokens. What follows the item stays where it is."""
        return replace(self, offsets=self.offsets[keep.to(self.offsets.device)])


@dataclass(frozen=True, kw_only=True)
class Cube:
    """Consecutive frames of a clip that a reducer joined.

    Attributes:
        first_frame, num_frames: Among the sampled frames of the clip.
        start_s, end_s: Time from the clip's start to the cube's first frame and to the next cube's, or the clip's end.
    """

    first_frame: int
    num_frames: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """The visual tokens of one item, in the form that the decoder receives.

    Attributes:
        embeddings: (N, D) in the model's dtype.
        positions: (N, 3) int64, the (t, h, w) cell of each token in `grid`, in ascending raster order. A merged token
            has the cell of its anchor.
        sizes: (N,) float32, the number of original tokens that each token stands for.
        grid: Cells of the unreduced item. N = t * h * w before reduction.
        kind: "image" or "video".
        aux_features: Auxiliary features of the tower, by name (`mm.plugins.features`). Their last axis is N. They are
            dropped after reduction.
        seconds_per_step: Clip time between two steps along t. None for an image, and for families that do not use it.
        crops: For an image that is cut into crops: the numbers of rows and columns of crops. The steps of `grid` are
            then the crops, row by row, followed by the whole image at the size of one crop. Else None.
        protected: (N,) bool, tokens that reducers inside the decoder have to keep. None protects no token.
        placement: Positions in the prompt; None where they follow from the grid.
        borders: The steps at which a reducer began another cube; empty where it made none.
        layer_planes: (L, N, D) of models with DeepStack: what is added to the tokens after each of the first L layers
            of the decoder. None for other models.
        text: What stands for the unreduced item in the prompt, as the checkpoint's processor writes it: a placeholder
            for each token, and text between them. None where the family knows it.
        layout: What the processor says of the item beside pixels, such as `image_grid_thw`; positions follow from it.
    """

    embeddings: Tensor
    positions: Tensor
    sizes: Tensor
    grid: Grid
    kind: Kind
    aux_features: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    seconds_per_step: float | None = None
    crops: tuple[int, int] | None = None
    protected: Tensor | None = None
    placement: Placement | None = None
    borders: tuple[int, ...] = ()
    layer_planes: Tensor | None = None
    text: str | None = None
    layout: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

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
        """Unreduced tokens from `embeddings` (t * h * w, D) in raster order.

        Raises:
            ValueError: The number of embeddings is another one than that of cells.
        """
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
        """(N,) int64: the raster index of each token in the unreduced grid."""
        _, h, w = self.grid
        return (self.positions[:, 0] * h + self.positions[:, 1]) * w + self.positions[:, 2]

    def without_aux_features(self) -> VisualTokens:
        return replace(self, aux_features={})


@dataclass(frozen=True, kw_only=True)
class ItemCount:
    """How many visual tokens a media item has, before they are made.

    Attributes:
        grid, crops, text, layout: As `VisualTokens` has them.
        num_tokens: Those that enter the decoder; the most that may where it is not exact.
        is_exact: False where the reducer's count depends on the picture.
    """

    kind: Kind
    grid: Grid
    num_tokens: int
    is_exact: bool
    crops: tuple[int, int] | None = None
    text: str | None = None
    layout: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def num_tokens_in(self) -> int:
        """Those that the encoder makes."""
        t, h, w = self.grid
        return t * h * w

    def blank(self, width: int, num_planes: int = 0) -> VisualTokens:
        """Tokens of that number, without content.

        Args:
            num_planes: Layers after which the decoder adds further planes to visual tokens.
        """
        whole = VisualTokens.full(torch.zeros(self.num_tokens_in, 1), self.grid, self.kind, crops=self.crops)
        first = torch.arange(self.num_tokens)
        zeros = torch.zeros(1, width).expand(self.num_tokens, -1)
        return replace(
            whole,
            embeddings=zeros,
            positions=whole.positions[first],
            sizes=whole.sizes[first],
            layer_planes=zeros.expand(num_planes, -1, -1) if num_planes else None,
            text=self.text,
            layout=self.layout,
        )


@dataclass(frozen=True, kw_only=True)
class EncodeTimings:
    """Seconds that one item took in each stage of the encoder. A cache hit has 0 for the stages that it skipped."""

    load_s: float = 0.0
    encode_s: float = 0.0
    reduce_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One encoded media item, ready to be spliced into a prompt.

    Attributes:
        tokens: The tokens that the reducer kept.
        timings: Seconds of each stage for this item.
        cache_hit: Whether the feature cache held the tokens.
        key: Hash of all that the tokens depend on: content, encoder, reducer, tenant. Empty for tokens that must not be
            shared.
        fault: The reducer's error, if all tokens were kept because of it. Else empty.
        num_media_bytes: Size of the item's encoded file. 0 for pixels that were in memory.
        cubes: What a reducer made of a clip's frames; empty where it made no cubes.
        num_before_budget: Tokens before a budget of the request made them fewer; 0 where none did.
        budget_by: The reducer that did; "native" for a lower resolution.
    """

    tokens: VisualTokens
    timings: EncodeTimings = field(default_factory=EncodeTimings)
    cache_hit: bool = False
    key: str = ""
    fault: str = ""
    num_media_bytes: int = 0
    cubes: tuple[Cube, ...] = ()
    num_before_budget: int = 0
    budget_by: str = ""


@dataclass(frozen=True, kw_only=True)
class EncodedMedia:
    """All encoded media of one request. Every runtime hands this object from the encoder to the decoder.

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

    @property
    def media_bytes(self) -> Mapping[Kind, int]:
        """Size of the encoded files, by kind."""
        found: dict[Kind, int] = {}
        for item in self.items:
            found[item.tokens.kind] = found.get(item.tokens.kind, 0) + item.num_media_bytes
        return found


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The input of the decoder's first layer.

    Attributes:
        token_ids: (L,) int64. Visual tokens have the id of the placeholder.
        embeddings: (L, D).
        positions: (P, L) int64 with P = 1, or 3 for M-RoPE. By default each token has its position in the unreduced
            prompt; see `compact`.
        next_position: Position of the first generated token. By default the one that follows the unreduced prompt. With
            M-RoPE, tokens of a clip may have a larger position in time.
        is_visual: (L,) bool.
        layer_planes: (K, V, D), what is added to the V visual tokens after each of the first K layers. None for models
            without DeepStack.
        mask: (L, L) bool, which tokens each one attends to, where some attend to later ones: those of the same picture,
            or the whole prompt. None where every token attends to the earlier ones.
        mask_in_windows: Whether only layers with a window attend by the mask.
    """

    token_ids: Tensor
    embeddings: Tensor
    positions: Tensor
    next_position: int
    is_visual: Tensor
    layer_planes: Tensor | None = None
    mask: Tensor | None = None
    mask_in_windows: bool = False

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    def compact(self) -> Prompt:
        """The same tokens at positions 0, 1, 2, ... Only for prompts with P = 1."""
        assert self.positions.shape[0] == 1, "counting through positions in time, height and width loses the grid"
        positions = torch.arange(self.length, device=self.positions.device).unsqueeze(0)
        return replace(self, positions=positions, next_position=self.length)
