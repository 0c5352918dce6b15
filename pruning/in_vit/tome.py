"""ToMe: in each block of the tower, merge the tokens whose keys are most alike.

Paper     "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461 (training-free). From its equations.
Stage     in_vit, in every block between attention and MLP.
Needs     block_keys: a tower that runs its blocks one by one, and a projector that works token by token.
Cost      O(n^2 dh / 4) per block, less than the attention it saves.
Equation  M = keys averaged over heads, at length 1. A = tokens at even places, B = at odd ones, [CLS] and other tokens
          that are no patches in neither. Each of A has a best partner in B by cosine; the r_l of A that are most alike
          join theirs: x = sum s_i x_i / sum s_i, s = sum s_i. Attention after it adds log s to the scores. Over L
          blocks r_l falls or rises along a line: lo = floor(r (1 - slope)), hi = 2 r - lo,
          r_l = int(lo + (hi - lo) l / (L - 1)), never more than half of what is left.
Differs   from the paper in how much is asked for: `keep_ratio` gives the sum of all r_l, what r_l leaves of it goes to
          the first blocks. A token that was merged stands in the place of the one that it joined. With several tokens
          that are no patches, these stay in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid
from mm.errors import InvalidOption
from mm.plugins.features import BLOCK_KEYS
from mm.plugins.reducer import Matched, Stage
from pruning.base import BaseReducer, budget, ratio_option, unit_rows


@dataclass(frozen=True, kw_only=True)
class ToMe(BaseReducer):
    """Merge what is alike, block by block, inside the tower (ToMe).

    Attributes:
        keep_ratio: Tokens that leave the tower / patches, in (0, 1].
        slope: Where tokens are merged: 0 evenly, -1 mostly in the first blocks, 1 mostly in the last.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_VIT,)
    needs: ClassVar[frozenset[str]] = frozenset({BLOCK_KEYS})
    keep_ratio: float = 0.5
    slope: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option("ToMe", "keep_ratio", self.keep_ratio))
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float) or not -1 <= self.slope <= 1:
            raise InvalidOption("ToMe", "slope", f"has to be a number from -1 to 1, got {self.slope!r}")
        object.__setattr__(self, "slope", float(self.slope))

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        steps, height, width = grid or (1, 1, num_tokens)
        return steps * budget(height * width, self.keep_ratio)

    def merges(self, num_patches: int, num_blocks: int) -> tuple[int, ...]:
        """How many tokens each block merges away.

        Raises:
            InvalidOption: So few blocks cannot merge so much.
        """
        total = num_patches - budget(num_patches, self.keep_ratio)
        line = schedule(num_blocks, total // num_blocks, self.slope) if num_blocks else []
        for extra in range(num_patches + 1):
            found = _capped([count + extra for count in line], num_patches, total)
            if sum(found) == total:
                return found
        message = f"of {self.keep_ratio} is out of reach: each of {num_blocks} blocks merges half of its tokens at most"
        raise InvalidOption("ToMe", "keep_ratio", message)

    @torch.no_grad()
    def match(self, keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
        """See `mm.plugins.reducer.InTower`."""
        return match(keys, num_merged, num_prefix)


def schedule(num_blocks: int, merged_per_block: int, slope: float) -> list[int]:
    """Tokens merged in each block, along a line whose mean is `merged_per_block`."""
    first = math.floor(merged_per_block * (1 - slope))
    last = 2 * merged_per_block - first
    steps = max(1, num_blocks - 1)
    return [int(first + (last - first) * block / steps) for block in range(num_blocks)]


def _capped(wanted: list[int], num_patches: int, total: int) -> tuple[int, ...]:
    found = []
    for count in wanted:
        found.append(min(count, num_patches // 2, total))
        num_patches, total = num_patches - found[-1], total - found[-1]
    return tuple(found)


def match(keys: Tensor, num_merged: int, num_prefix: int) -> Matched:
    """Which tokens become one, for a batch (B, n, dh); the lowest index wins a tie.

    Order of what is left: first the tokens in front that are no patches, then those of A that join none, then B. Those
    of A are in order of place, or in order of likeness where no tokens stand in front, as in the authors' code: this
    decides which tokens meet in the next block.
    """
    places = torch.arange(num_prefix, keys.shape[1], device=keys.device)
    a, b = places[places % 2 == 0], places[places % 2 == 1]
    unit = unit_rows(keys)
    likeness, partner = (unit[:, a] @ unit[:, b].mT).max(dim=2)
    ranked = torch.sort(likeness, dim=1, descending=True, stable=True).indices
    joining, alone = ranked[:, :num_merged], ranked[:, num_merged:]
    alone = alone.sort(dim=1).values if num_prefix else alone
    prefix = torch.arange(num_prefix, device=keys.device)
    batch = keys.shape[0]
    anchors = torch.cat([prefix.expand(batch, -1), a[alone], b.expand(batch, -1)], dim=1)
    slots = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    slots.scatter_(1, anchors, torch.arange(anchors.shape[1], device=keys.device).expand(batch, -1))
    joined = slots.gather(1, b[partner.gather(1, joining)])
    return Matched(slots=slots.scatter(1, a[joining], joined), anchors=anchors)
