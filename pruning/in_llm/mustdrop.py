"""MustDrop: merge what is alike in space, drop what the question ignores, cache only what the answer will use.

Paper     arXiv:2411.10803, training-free.                   Stage  three of them, see below.
Needs     cls_attention (H, N) for the key tokens.           Cost   O(N D), and attention rows of the text after the
          media at a few layers, 64 at a time; no full map.
Equation  merging   a w x w window whose tokens' mean pairwise cosine is at least `similarity` becomes their mean;
                    of what is left the ceil(N' * key_ratio) tokens with most of [CLS]'s attention are key tokens.
          filtering with A (text rows, visual columns) of layer l, a token goes where sum_t A_tj is below
                    `global_share` of all columns' sum and max_t A_tj is below `peak`; key tokens stay.
          caching   the layers in which tokens were filtered keep only the tokens that survived all of them.
Positions authors: counted anew in each layer where tokens leave (`vision.positions`: "as_published"); here kept.
Differs   from the paper: merging looks at projected tokens and not at those after the tower's first block, so that
          any tower will do; [CLS]'s attention to a merged token is the mean over its window, and that of the block
          that the features come from, where the authors take the last block's.
          From the authors' code: a merged token stands where its window begins, windows that a border or an earlier
          reducer cuts stay as they are, any number of items and of layers, at least one token is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, PublishedPositions, VisualTokens
from mm.plugins.cache_view import CacheView
from mm.plugins.reducer import Count, PrefillView, ReduceContext, Reduction, Stage
from pruning.base import budget, int_option, keep_all, number_option, top_k_ascending
from pruning.helpers.ranking import layers_option, scaled

CLS_ATTENTION = "cls_attention"
PAPER_LAYERS, PAPER_DEPTH = (3, 7, 11, 15), 32
"""At whose inputs the authors drop, and of how many layers."""

ROWS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class MustDrop:
    """Merge alike neighbours, filter in prefill, evict from the cache (MustDrop).

    The defaults keep about 64 of LLaVA-1.5's 576 tokens; a `global_share` of 0.001 with a `peak` of 0.001 about 192.

    Attributes:
        window: Side of the squares that may become one token; 1 merges nothing.
        similarity: Mean cosine from which a square is merged, -1 to 1.
        key_ratio: Share of the tokens that no later stage may drop, 0 to 1; 0 needs nothing from the tower.
        global_share: Share of all attention that visual tokens get, below which one may go.
        peak: Attention of a single row, below which it may go.
        at_layers: At whose inputs tokens are filtered; empty takes the depths of the paper, 3, 7, 11 and 15 of 32.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM, Stage.IN_PREFILL, Stage.IN_DECODE)
    query_aware: ClassVar[bool] = True
    count: ClassVar[Count] = "bounded"
    published_positions: ClassVar[PublishedPositions] = "renumbered"
    window: int = 3
    similarity: float = 0.8
    key_ratio: float = 0.08
    global_share: float = 0.011
    peak: float = 0.01
    at_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", int_option("mustdrop", "window", self.window, 1, 64))
        object.__setattr__(self, "at_layers", layers_option("mustdrop", "at_layers", self.at_layers))
        for option, low in (("similarity", -1), ("key_ratio", 0), ("global_share", 0), ("peak", 0)):
            object.__setattr__(self, option, number_option("mustdrop", option, getattr(self, option), low, 1))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({CLS_ATTENTION} if self.key_ratio else ())

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        """At most all: how many depends on the picture and on the question."""
        return num_tokens

    # ── before the decoder ────────────────────────────────────────────────────────────────────────────────────────────

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        merged = merge_windows(tokens, self.window, self.similarity)
        if not self.key_ratio or not tokens.num_tokens:
            return merged
        attention = context.aux_features[CLS_ATTENTION].float().mean(dim=0)
        if merged.merge is not None:
            attention = torch.mv(merged.merge, attention)
        num_left = merged.keep.shape[0]
        keys = torch.zeros(num_left, dtype=torch.bool, device=merged.keep.device)
        keys[top_k_ascending(attention, budget(num_left, self.key_ratio, "ceil"))] = True
        return Reduction(keep=merged.keep, merge=merged.merge, sizes=merged.sizes, protected=keys)

    # ── in prefill ────────────────────────────────────────────────────────────────────────────────────────────────────

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return self.at_layers or scaled(PAPER_LAYERS, num_layers, PAPER_DEPTH)

    def in_prefill(self, layer: int, view: PrefillView) -> Tensor:
        sums, peaks = _attention_of_text(view, layer - 1)
        keep = filtered(sums, peaks, self.global_share, self.peak) | view.protected
        return keep.nonzero().squeeze(1)

    # ── in the cache ──────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill_done(self, view: CacheView) -> Mapping[int, Tensor]:
        borders = self.layers(len(view.lengths))
        kept: dict[int, Tensor] = {}
        for layer in range(borders[0] - 1, borders[-1]) if borders else ():
            visual = view.visual[layer]
            gone = visual[~torch.isin(view.origins[layer], view.origins[-1])]
            if len(gone):
                stays = torch.ones(view.lengths[layer], dtype=torch.bool, device=visual.device)
                stays[gone] = False
                kept[layer] = stays.nonzero().squeeze(1)
        return kept


def merge_windows(tokens: VisualTokens, window: int, similarity: float) -> Reduction:
    """Each whole `window` x `window` square of a step of the grid whose tokens are alike becomes their mean."""
    squares = _whole_squares(tokens, window)
    if window < 2 or not len(squares):
        return keep_all(tokens)
    squares = squares[window_scores(tokens.embeddings[squares]) >= similarity]
    num_tokens, device = tokens.num_tokens, tokens.embeddings.device
    anchor = torch.arange(num_tokens, device=device)
    anchor[squares.flatten()] = squares[:, :1].expand(-1, squares.shape[1]).flatten()
    keep, row = anchor.unique(return_inverse=True)
    members = torch.zeros(len(keep), device=device).index_add_(0, row, torch.ones(num_tokens, device=device))
    places = torch.stack([row, torch.arange(num_tokens, device=device)])
    weights = torch.sparse_coo_tensor(places, (1 / members)[row], (len(keep), num_tokens), check_invariants=False)
    sizes = torch.zeros(len(keep), device=device).index_add_(0, row, tokens.sizes.float())
    return Reduction(keep=keep, merge=weights.coalesce(), sizes=sizes)


def _whole_squares(tokens: VisualTokens, window: int) -> Tensor:
    """(W, window * window) int64: the tokens of each square of which none is missing, in reading order."""
    steps, height, width = tokens.grid
    at = torch.full((steps * height * width,), -1, device=tokens.embeddings.device)
    at[tokens.indices] = torch.arange(tokens.num_tokens, device=at.device)
    rows, columns = height // window, width // window
    cells = at.view(steps, height, width)[:, : rows * window, : columns * window]
    squares = cells.reshape(steps, rows, window, columns, window).permute(0, 1, 3, 2, 4).reshape(-1, window**2)
    return squares[(squares >= 0).all(dim=1)]


def window_scores(windows: Tensor) -> Tensor:
    """(W,) float32: mean cosine between two different tokens of each window (W, n, D)."""
    size = windows.shape[1]
    units = torch.nn.functional.normalize(windows.float(), dim=-1, eps=1e-12)
    return (units.sum(dim=1).square().sum(dim=-1) - units.square().sum(dim=(1, 2))) / (size * (size - 1))


def filtered(sums: Tensor, peaks: Tensor, global_share: float, peak: float) -> Tensor:
    """(V,) bool: visual columns that the text attends to, by the sum and by the largest of its rows; never none."""
    keep = (sums >= global_share * sums.sum()) | (peaks >= peak)
    keep[sums.argmax()] = True
    return keep


def _attention_of_text(view: PrefillView, layer: int) -> tuple[Tensor, Tensor]:
    """Sum and largest attention, averaged over heads, that each visual row (V,) gets from the text after all media."""
    text = torch.arange(int(view.visual[-1]) + 1, view.num_rows, device=view.visual.device)
    text = text if len(text) else view.visual[-1:]
    parts = [view.attention_rows(rows, layer).mean(dim=0) for rows in text.split(ROWS_AT_A_TIME)]
    sums = torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)
    return sums, torch.stack([part.amax(dim=0) for part in parts]).amax(dim=0)
