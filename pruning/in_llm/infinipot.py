"""InfiniPot-V: keep of a clip's cache what is new in time and what has large values, whatever will be asked.

Paper     "InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding", NeurIPS 2025,
          arXiv:2506.15745 (training-free).
Stage     in_decode: entries leave the cache once the prompt is in; clips only.
Needs     keys and values of the cache.                          Cost   O(F N d) per layer, no attention.
Equation  of a clip's k entries, t = k - round((1 - redundancy_share) k) are taken by novelty: those of the last
          floor(F recent_share) frames, and of the others those with the smallest mean over these frames q of
          cos(K_tp, K_qp), the same cell p in both. The others are those with the largest |V|_2. Layer by layer.
Positions authors: kept; here kept.
Differs   from the authors' code: all heads of a layer keep the same tokens, by their mean, where theirs choose apart;
          the prompt is computed whole and then thinned, where theirs thins whenever a memory limit is reached, so the
          peak of the cache is not lower here; the option to average |V| over neighbours is left out (it is off by
          default). Where the last frames are more than t, as many whole frames count as recent as t holds, where
          theirs fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.plugins.cache_view import CacheView
from mm.plugins.reducer import Stage
from pruning.base import BaseReducer, budget, number_option, ratio_option, top_k_ascending, unit_rows


@dataclass(frozen=True, kw_only=True)
class InfiniPot(BaseReducer):
    """Keep of a clip's cache what is new in time or has large values (InfiniPot-V). It does not read the question.

    Attributes:
        keep_ratio: Entries of a clip kept in each layer's cache / its tokens, in (0, 1].
        redundancy_share: Share of the kept entries that are chosen by novelty, 0 to 1; the others by their values.
        recent_share: Share of the frames that count as recent, 0 to 1; at least one does.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_DECODE,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"video"})
    keep_ratio: float = 0.25
    redundancy_share: float = 0.5
    recent_share: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option("infinipot", "keep_ratio", self.keep_ratio))
        for option in ("redundancy_share", "recent_share"):
            object.__setattr__(self, option, number_option("infinipot", option, getattr(self, option), 0, 1))

    def prefill_done(self, view: CacheView) -> Mapping[int, Tensor]:
        clips = [item for item, kind in enumerate(view.item_kinds) if kind == "video"]
        kept: dict[int, Tensor] = {}
        for layer, length in enumerate(view.lengths) if clips else ():
            keys, values = view.read(layer)
            stays = torch.ones(length, dtype=torch.bool, device=keys.device)
            for item in clips:
                mine = view.items[view.origins[layer]] == item
                entries, cells = view.visual[layer][mine], view.cells[view.origins[layer][mine]]
                k = budget(int((view.items == item).sum()), self.keep_ratio)
                if k < len(entries):
                    stays[entries] = False
                    stays[entries[self.choose(keys[entries], values[entries], cells, k)]] = True
            if not bool(stays.all()):
                kept[layer] = stays.nonzero().squeeze(1)
        return kept

    def choose(self, keys: Tensor, values: Tensor, cells: Tensor, k: int) -> Tensor:
        """(k,) int64, ascending: which entries of one clip stay in a layer.

        Args:
            keys, values: (n, H, d).
            cells: (n, 3), the cell of each in the clip's grid; some may be missing.
        """
        num_new = k - round((1 - self.redundancy_share) * k)
        scores = values.float().norm(dim=2).mean(dim=1)
        if num_new:
            scores[newest(keys, cells, num_new, self.recent_share)] = torch.inf
        return _top(scores, k)


def newest(keys: Tensor, cells: Tensor, k: int, recent_share: float) -> Tensor:
    """(k,) int64: the entries of the last frames, and those that resemble them least."""
    steps, sizes = cells[:, 0].unique(return_counts=True)
    num_recent = max(1, int(len(steps) * recent_share))
    while num_recent > 1 and int(sizes[-num_recent:].sum()) > k:
        num_recent -= 1
    is_recent = cells[:, 0] >= steps[-num_recent]
    scores = -likeness(keys, cells, is_recent)
    if int(is_recent.sum()) <= k:
        scores = scores.masked_fill(is_recent, torch.inf)
    return _top(scores, k)


def likeness(keys: Tensor, cells: Tensor, is_recent: Tensor) -> Tensor:
    """(n,) float32: mean cosine of each entry's keys with those of its cell in the recent frames; 0 without any."""
    unit = unit_rows(keys)
    columns = cells[:, 1] * (int(cells[:, 2].max()) + 1) + cells[:, 2]
    places, cell = columns.unique(return_inverse=True)
    recent = torch.zeros(len(places), *unit.shape[1:], device=keys.device).index_add_(
        0, cell[is_recent], unit[is_recent]
    )
    counts = torch.bincount(cell[is_recent], minlength=len(places)).clamp_min(1)
    return (unit * (recent / counts.view(-1, 1, 1))[cell]).sum(dim=2).mean(dim=1)


def _top(scores: Tensor, k: int) -> Tensor:
    """As `top_k_ascending`, where plus infinity comes first."""
    finite = scores.masked_fill(torch.isinf(scores), 0.0)
    return top_k_ascending(torch.where(scores == torch.inf, finite.nan_to_num(0).abs().max() + 1, scores), k)
