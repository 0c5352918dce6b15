"""What a reducer sees of the KV cache once a prompt is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mm.data.media import Kind


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """What a reducer sees of one prompt in the KV cache, layer by layer.

    Attributes:
        lengths: Cache entries that each layer holds.
        visual: (V,) int64 per layer, which of these entries are visual.
        origins: (V,) int64 per layer, which of the prompt's visual tokens these are, counted over all its items.
        items: (all visual tokens,) int64, which item each of the prompt's visual tokens belongs to.
        cells: (all visual tokens, 3) int64, the (t, h, w) cell of each in its item's grid.
        item_kinds: Per item, "image" or "video".
        read: A layer to its keys, as they are rotated, and its values: (entries, H_kv, d) each, copies.
    """

    lengths: tuple[int, ...]
    visual: tuple[Tensor, ...]
    origins: tuple[Tensor, ...]
    items: Tensor
    cells: Tensor
    item_kinds: tuple[Kind, ...]
    read: Callable[[int], tuple[Tensor, Tensor]]
