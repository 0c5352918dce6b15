"""The protocols of reducers: what each declares, and the methods it has for each stage where it acts.

A reducer declares once, in `acts_at`, at which stages it acts. The methods follow from that:

| stage                 | protocol        | methods                                  |
|-----------------------|-----------------|------------------------------------------|
| PIXELS                | `OnPixels`      | plan, resolution                         |
| BEFORE_VIT            | `BeforeTower`   | plan, keep_cells                         |
| IN_VIT                | `InTower`       | plan, merges, match                      |
| TEMPORAL, PRE_LLM     | `BeforeDecoder` | plan, after_encode                       |
| IN_PREFILL            | `InPrefill`     | layers, in_prefill                       |
| IN_DECODE             | `InDecode`      | prefill_done                             |
| PER_TOKEN             | `PerToken`      | token_layer, keep_tokens                 |

A reducer with trained weights is a `Learned` one besides. `mm.plugins.capabilities` derives everything else from the
declaration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol, Self, runtime_checkable

from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, Placement, VisualTokens
from mm.plugins.cache_view import CacheView
from mm.plugins.weights import ReducerWeights

Count = Literal["fixed", "bounded"]


class Stage(Enum):
    """Where a reducer acts, in the order in which a token meets the stages."""

    PIXELS = "pixels"
    BEFORE_VIT = "before_vit"
    IN_VIT = "in_vit"
    TEMPORAL = "temporal"
    PRE_LLM = "pre_llm"
    IN_PREFILL = "in_prefill"
    IN_DECODE = "in_decode"
    PER_TOKEN = "per_token"


@runtime_checkable
class Reducer(Protocol):
    """Fewer visual tokens out of many. Immutable; its options are its dataclass fields.

    This is what every reducer declares. The protocols below add the methods of each stage. Most reducers declare by
    class variables. Five more are optional:

        kinds: What it reduces, "image", "video" or both (the default). Items of another kind stay as they are.
        needs_grid: True where every cell of the grid has to be present, so that no other reducer may come first.
        positions: "compact" where the tokens that are left have to be numbered anew; "kept" is the default.
        rewrites: True where it computes new tokens (`Reduction.embeddings`), so that no row stays as it was.
        published_positions: What the method's authors did, for requests that ask for "as_published": "kept" (the
            default), "compact", or "renumbered" where positions begin anew in each layer in which tokens are dropped.
        trained: True where it has weights of its own, see `Learned`.

    Attributes:
        acts_at: The stages where it acts, in the order of `Stage`.
        needs: Names of the auxiliary features that the encoder has to supply.
        query_aware: Whether the result depends on the question.
        count: "fixed" when `plan` is exact, "bounded" when it is an upper bound.
    """

    @property
    def acts_at(self) -> tuple[Stage, ...]: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def query_aware(self) -> bool: ...

    @property
    def count(self) -> Count: ...


@runtime_checkable
class Learned(Reducer, Protocol):
    """A reducer with trained weights. Its class variable `trained` is True, and `weights` is one of its options.

    The options alone make a reducer that cannot reduce yet. `bind` gives it the weights; `mm.plugins.spec.bind` finds
    them for a model and calls it. A model's decoder may have other weights for a learned reducer
    (`ReducerWeights.adapts_decoder`): the engine then runs the requests with this reducer through those.
    """

    @property
    def weights(self) -> str:
        """Which weights, see `mm.plugins.weights`. The option's default is the reducer's own name."""
        ...

    @property
    def loaded(self) -> ReducerWeights | None:
        """The weights that it was given; None before `bind`."""
        ...

    def bind(self, weights: ReducerWeights) -> Self:
        """The same reducer with its weights, for instance with `network`.

        Options that were left open get the values for which the weights were trained, so that the canonical text has
        them. `weights` becomes `ReducerWeights.pinned`.

        Raises:
            BadWeights: The weights do not fit.
            InvalidOption: An option asks for what these weights cannot do.
        """
        ...

    @classmethod
    def untrained(cls, width: int) -> ReducerWeights:
        """Weights as a training starts with, for a decoder of that width. The contract tests use them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reducer's decision about the N tokens of one item. `mm.plugins.apply` carries it out.

    Attributes:
        keep: (k,) int64, ascending and unique: the kept tokens, or the anchors of merged ones.
        merge: (k, N) sparse or dense weights whose rows sum to 1, or None when kept tokens stay as they are.
        sizes: (k,) float32, how many original tokens each stands for; None gathers the input's.
        protected: (k,) bool, kept tokens that later stages have to keep too; None gathers the input's.
        embeddings: (k, D) in place of the anchors' own or merged ones, for a reducer that computes new tokens.
        placement: The k tokens' positions in the prompt; None keeps those of the anchors.
        borders: Steps along t at which the reducer began another cube.
    """

    keep: Tensor
    merge: Tensor | None = None
    sizes: Tensor | None = None
    protected: Tensor | None = None
    embeddings: Tensor | None = None
    placement: Placement | None = None
    borders: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReduceContext:
    """What a reducer may know beside the tokens.

    Attributes:
        aux_features: What the encoder supplies beside the tokens, by the names in `Reducer.needs`.
        text_embeddings: (T, D), the question's tokens as the decoder embeds them; for reducers that need
            `TEXT_EMBEDDINGS`. (0, D) where the question is empty.
        clip_text: (S, P), the question as CLIP's text tower embeds it, one row per piece that its context holds; for
            reducers that need `CLIP_TEXT`. (0, P) where the question is empty.
    """

    aux_features: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    text_embeddings: Tensor | None = None
    clip_text: Tensor | None = None


class PlansTokens(Reducer, Protocol):
    """A reducer that knows how many tokens it keeps, before anything is encoded."""

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """How many of `num_tokens` are kept.

        Args:
            grid: Cells of the unreduced item; None takes the tokens as one row.
            kind: What the item is.
        """
        ...


class BeforeDecoder(PlansTokens, Protocol):
    """A reducer of the stages TEMPORAL and PRE_LLM: after the projector and before the decoder."""

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        """Decide about one item's tokens. Must not change its arguments."""
        ...


class FrameStream(Protocol):
    """One clip of a `Streams` reducer, whose frames come in chunks."""

    def add(self, tokens: VisualTokens) -> None:
        """Take the tokens of the next frames: a clip of their own, as the encoder gives it."""
        ...

    def finish(self) -> VisualTokens:
        """What is left of all frames. Called once, at the end."""
        ...


@runtime_checkable
class Settles(FrameStream, Protocol):
    """A stream that knows its first tokens before the last frame. They may be computed in the decoder meanwhile."""

    def settled(self) -> VisualTokens | None:
        """The tokens that no later frame changes: the first ones of `finish`. None while there are none."""
        ...


@runtime_checkable
class Streams(BeforeDecoder, Protocol):
    """A reducer of the stage TEMPORAL that needs no more than some frames at a time.

    Where the encoder sees frames apart (`frames_apart`), a clip then never has all its tokens in memory.
    """

    def stream(self) -> FrameStream:
        """For one clip. The chunks' sizes must not matter: `after_encode` gives the same for the whole clip."""
        ...


class OnPixels(PlansTokens, Protocol):
    """A reducer of the stage PIXELS: the checkpoint's own way to make fewer tokens, such as a lower resolution."""

    def resolution(self) -> float:
        """Tokens to make / tokens that the checkpoint would make by itself, at most."""
        ...


class BeforeTower(PlansTokens, Protocol):
    """A reducer of the stage BEFORE_VIT: cells, which become one token each, that never enter the tower."""

    def keep_cells(self, pixels: Tensor) -> Tensor:
        """(t, h, w) bool, which cells stay, of pixels (t, h, w, n) float32; 1 is the range from black to white."""
        ...


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Which tokens of a batch become one. They become their mean, weighted by how many patches each stands for.

    Attributes:
        slots: (B, n) int64, for each of n tokens its index among the m that are left.
        anchors: (B, m) int64, for each token that is left the token whose position it takes; one of those it merges.
    """

    slots: Tensor
    anchors: Tensor


class InTower(PlansTokens, Protocol):
    """A reducer of the stage IN_VIT: merges tokens in the tower's blocks, between attention and MLP."""

    def merges(self, num_patches: int, num_blocks: int) -> tuple[int, ...]:
        """How many tokens each block merges away. The same for all pictures of a batch.

        Raises:
            InvalidOption: So few blocks cannot merge so much.
        """
        ...

    def match(self, keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
        """Which tokens are merged in one block.

        Args:
            keys: (B, n, dh) float32, averaged over heads.
            num_merged: How many tokens fewer are left.
            num_prefix: Leading tokens that are no patches, [CLS] among them. They are not merged and stay in front.
        """
        ...


class PrefillView(Protocol):
    """What a reducer sees of one prompt at the input of a decoder layer.

    Attributes:
        layer: The layer about to run, of `num_layers`.
        hidden: (n, D), the prompt's tokens that are left.
        visual: (V,) int64, which of these n are visual.
        origins: (V,) int64, which of the prompt's visual tokens these are, counted over all its items.
        items: (V,) int64, which item each of them belongs to.
        item_sizes: Per item, visual tokens that entered the decoder.
        item_kinds: Per item, "image" or "video".
        protected: (V,) bool, those that an earlier stage of the reducer wants kept.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    visual: Tensor
    origins: Tensor
    items: Tensor
    item_sizes: tuple[int, ...]
    item_kinds: tuple[Kind, ...]
    protected: Tensor

    @property
    def num_rows(self) -> int:
        """n."""
        ...

    def attention_rows(self, rows: Tensor, layer: int | None = None) -> Tensor:
        """(H, r, V) float32: attention of a few tokens `rows` (r,) int64 to the visual ones, without a full map.

        Args:
            layer: The layer about to run (the default), or the one before it. Before layer 0 there is none.
        """
        ...

    def keys(self) -> Tensor:
        """(n, H_kv, d): this layer's rotated keys."""
        ...


class InPrefill(Reducer, Protocol):
    """A reducer of the stage IN_PREFILL: drops visual tokens at the input of some decoder layers.

    The decision may read a network: a learned one is a `Learned` reducer besides.
    """

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """At the input of which of `num_layers` layers `in_prefill` is called, ascending. 0 sees the embeddings."""
        ...

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        """(k,) int64, ascending: which of `view.visual` stay, in this layer and all later ones."""
        ...


class InDecode(Reducer, Protocol):
    """A reducer of the stage IN_DECODE: evicts entries from the KV cache after prefill."""

    def prefill_done(self, view: CacheView) -> Mapping[int, Tensor]:
        """Layer to (k,) int64, the entries of its cache that stay, ascending. Layers not named keep all."""
        ...


class PerToken(Reducer, Protocol):
    """A reducer of the stage PER_TOKEN: decides about each generated token whether later ones may attend to it.

    A dropped token's keys and values are not kept in the layers from `token_layer` on. The token itself sees them, in
    every layer. Below that layer everything is kept. No token's position changes.
    """

    def token_layer(self, num_layers: int) -> int:
        """At the input of which of `num_layers` layers `keep_tokens` is called."""
        ...

    def keep_tokens(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """(n,) bool: which of these tokens are kept. A row's answer must not depend on the other rows.

        Args:
            hidden: (n, D), the tokens at the input of the layer. They may belong to different sequences.
            indices: (n,) int64, the place of each in its own output, from 0 on.
        """
        ...
