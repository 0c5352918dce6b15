"""Encoded media items by content, within a limit of memory.

A hit saves tower, projector and reducer. A key depends on everything that an entry depends on: content, encoder,
reducer, tenant, and the question if the reducer reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cachetools import LRUCache
from torch import Tensor

from mm.data.tokens import Encoded, VisualTokens
from mm.media.hashing import framed_hash


def cache_key(content_hash: str, fingerprint: str, reducer_spec: str, tenant: str = "", question: str = "") -> str:
    """The key of one item for one encoder and one reducer.

    Args:
        tenant: Different tenants never share entries.
        question: The user's text if the reducer reads it, else empty.
    """
    return framed_hash(
        "visual-tokens",
        *("content", content_hash),
        *("encoder", fingerprint),
        *("reducer", reducer_spec),
        *("tenant", tenant),
        *("question", question),
    )


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Counts since the cache was made, and its present size."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bypassed: int = 0
    num_items: int = 0
    num_bytes: int = 0


class FeatureCache:
    """A cache that evicts the least recently used entries first. It may be shared between threads.

    Args:
        max_bytes: Memory of all stored tensors together. 0 stores nothing, and a larger item is not stored.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries = _Counting(max_bytes)
        self._hits = self._misses = self._bypassed = 0

    def get(self, key: str) -> Encoded | None:
        """The stored item, marked as a hit, or None. Callers share its tensors and must not change them."""
        with self._lock:
            found = self._entries.get(key)
            self._hits += found is not None
            self._misses += found is None
        return replace(found, cache_hit=True) if found is not None else None

    def put(self, key: str, value: Encoded) -> None:
        """Store a copy of `value` without auxiliary features."""
        num_bytes = encoded_bytes(value.tokens.without_aux_features())
        if num_bytes > self.max_bytes:
            with self._lock:
                self._bypassed += 1
            return
        # A copy, since a view would keep the whole batch in memory. It is made outside the lock.
        stored = replace(value, tokens=_copy(value.tokens))
        with self._lock:
            # The old entry is removed first. Otherwise cachetools counts both while it evicts others.
            self._entries.pop(key, None)
            self._entries[key] = stored

    def clear(self) -> None:
        """Drop all entries. The counts are kept."""
        with self._lock:
            self._entries = _Counting(self.max_bytes, self._entries.evictions)

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._entries.evictions,
                bypassed=self._bypassed,
                num_items=len(self._entries),
                num_bytes=int(self._entries.currsize),
            )


class _Counting(LRUCache[str, Encoded]):
    def __init__(self, max_bytes: int, evictions: int = 0) -> None:
        super().__init__(max_bytes, getsizeof=_size)
        self.evictions = evictions

    def popitem(self) -> tuple[str, Encoded]:
        self.evictions += 1
        return super().popitem()


def _size(item: Encoded) -> int:
    return encoded_bytes(item.tokens)


def encoded_bytes(tokens: VisualTokens) -> int:
    """Memory of all tensors of `tokens`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tokens))


def _tensors(tokens: VisualTokens) -> Iterator[Tensor]:
    yield from (tokens.embeddings, tokens.positions, tokens.sizes, *tokens.aux_features.values())
    yield from tokens.layout.values()
    yield from (plane for plane in (tokens.protected, tokens.layer_planes) if plane is not None)


def _copy(tokens: VisualTokens) -> VisualTokens:
    return replace(
        tokens,
        embeddings=tokens.embeddings.detach().clone(),
        positions=tokens.positions.clone(),
        sizes=tokens.sizes.clone(),
        protected=None if tokens.protected is None else tokens.protected.clone(),
        layer_planes=None if tokens.layer_planes is None else tokens.layer_planes.detach().clone(),
        layout={name: tensor.clone() for name, tensor in tokens.layout.items()},
        aux_features={},
    )
