"""Keys and values of one sequence. Everything that touches the cache's layout is in this file.

A row's place in the cache and its rotary position are different things: after reduction, rows are dense and positions
are not. Keys and values are separate tensors per layer, and every layer has its own length, so that layers may come to
hold different rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Room for `capacity` rows in each layer; written in place, owned by one request.

    Args:
        num_heads: Key/value heads.
        head_dim: Width of one head.
    """

    def __init__(
        self, *, num_layers: int, num_heads: int, head_dim: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (1, num_heads, capacity, head_dim)
        self._keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self._values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self._lengths = [0] * num_layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (1, H_kv, L, d) rows behind those the layer holds and return views of all of them."""
        start = self._lengths[layer]
        end = start + key.shape[2]
        if end > self._keys[layer].shape[2]:
            raise AssertionError(f"layer {layer} has no room for row {end} of {self._keys[layer].shape[2]}")
        self._keys[layer][:, :, start:end] = key
        self._values[layer][:, :, start:end] = value
        self._lengths[layer] = end
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def length(self, layer: int = 0) -> int:
        """Rows that a layer holds."""
        return self._lengths[layer]

    def rewind(self, length: int) -> None:
        """Forget every row from `length` on, in all layers, so that another answer can follow the same prompt."""
        self._lengths = [min(length, held) for held in self._lengths]

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows held, keys and values of all layers."""
        row_bytes = [k.shape[1] * k.shape[3] * k.element_size() * 2 for k in self._keys]
        return sum(held * size for held, size in zip(self._lengths, row_bytes, strict=True))
