"""What a reducer promises, at each stage where one may act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens

Count = Literal["fixed", "bounded"]


class Stage(Enum):
    """Where a reducer acts, in the order a token meets them."""

    IN_VIT = "in_vit"
    TEMPORAL = "temporal"
    PRE_LLM = "pre_llm"
    IN_PREFILL = "in_prefill"
    IN_DECODE = "in_decode"


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reducer's decision about the N tokens of one item. The engine applies it to every per-token plane.

    Attributes:
        keep: (k,) int64, ascending and unique: the kept tokens, or the anchors of merged ones.
        merge: (k, N) sparse or dense weights, rows summing to 1, or None when kept tokens stay as they are.
        sizes: (k,) float32, how many original tokens each stands for; None gathers the input's.
        protected: (k,) bool, kept tokens that later stages have to keep too; None gathers the input's.
    """

    keep: Tensor
    merge: Tensor | None = None
    sizes: Tensor | None = None
    protected: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ReduceContext:
    """What a reducer may know beside the tokens.

    Attributes:
        aux_features: What the tower observed, by the names in `Reducer.needs`.
        text_embeddings: (T, D), the question's tokens as the decoder embeds them; for reducers that need
            `TEXT_EMBEDDINGS`. No rows where nothing was asked.
    """

    aux_features: Mapping[str, Tensor] = field(default_factory=dict)
    text_embeddings: Tensor | None = None


@runtime_checkable
class Reducer(Protocol):
    """Fewer visual tokens out of many. Immutable; options are its dataclass fields.

    The four flags are class variables of most reducers; a pipeline derives them from its stages. Two more are optional:
    `kinds`, what it reduces ("image", "video" or both, the default; items of another kind stay as they are), and
    `needs_grid`, true where every cell of the grid has to be there, so that no other reducer may come first.

    Attributes:
        stage: Where it acts.
        needs: Names of the auxiliary features it must be given.
        query_aware: Whether the result depends on the question.
        count: "fixed" when `plan` is exact, "bounded" when it is an upper bound.
    """

    @property
    def stage(self) -> Stage: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def query_aware(self) -> bool: ...

    @property
    def count(self) -> Count: ...

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """Tokens kept of `num_tokens`, before anything is encoded.

        Args:
            grid: Cells of the unreduced item; None takes the tokens as one row.
            kind: What the item is.
        """
        ...

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        """Decide about one item's tokens, after the projector and before the decoder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Which tokens of a batch become one. They become their mean, weighted by how many patches each stands for.

    Attributes:
        slots: (B, n) int64, where each of n tokens goes among the m that are left.
        anchors: (B, m) int64, which of the n tokens each of these stands in the place of; it is among its own.
    """

    slots: Tensor
    anchors: Tensor


class InTower(Protocol):
    """A reducer of the stage IN_VIT: merges tokens in the tower's blocks, between attention and MLP."""

    def merges(self, num_patches: int, num_blocks: int) -> tuple[int, ...]:
        """How many tokens each block merges away, so that all pictures of a batch keep equally many.

        Raises:
            InvalidOption: It cannot be done in so many blocks.
        """
        ...

    def match(self, keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
        """Which tokens are merged in one block.

        Args:
            keys: (B, n, dh) float32, averaged over heads.
            num_merged: How many tokens fewer are left.
            num_prefix: Tokens in front that are no patches, [CLS] among them; they stay as they are, in front.
        """
        ...


class PrefillView(Protocol):
    """What a reducer sees of one prompt at the input of a decoder layer; see `mm.engine.model_runner.PrefillView`."""

    layer: int
    num_layers: int
    hidden: Tensor
    visual: Tensor
    origins: Tensor
    items: Tensor
    item_sizes: tuple[int, ...]
    protected: Tensor

    @property
    def num_rows(self) -> int: ...

    def attention_rows(self, rows: Tensor, layer: int | None = None) -> Tensor: ...

    def keys(self) -> Tensor: ...


class InPrefill(Protocol):
    """A reducer of the stage IN_PREFILL: drops visual rows at the input of some decoder layers."""

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """At the input of which of `num_layers` layers it is asked, ascending; not 0."""
        ...

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        """(k,) int64, ascending: which of `view.visual` stay, in this layer and all above."""
        ...


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """What a reducer sees of one prompt in the cache, layer by layer.

    Attributes:
        lengths: Rows that each layer holds.
        visual: (V,) int64 per layer, which of these rows are visual.
        origins: (V,) int64 per layer, which of the prompt's visual rows these are, counted over all its items.
    """

    lengths: tuple[int, ...]
    visual: tuple[Tensor, ...]
    origins: tuple[Tensor, ...]


class InDecode(Protocol):
    """A reducer of the stage IN_DECODE: evicts rows from the cache once the prompt is in."""

    def prefill_done(self, view: CacheView) -> Mapping[int, Tensor]:
        """Layer to (k,) int64 rows of its cache that stay, ascending; layers not named keep all."""
        ...
