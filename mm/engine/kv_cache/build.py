"""Makes a KV cache of a given size."""

from __future__ import annotations

from mm.engine.kv_cache.blocks import KVCache
from mm.engine.kv_cache.prefix_cache import PrefixCache
from mm.engine.tensor_parallel.cache import LeadingCache
from mm.engine.tensor_parallel.gang import Gang
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec

SNAPSHOT_SHARE = 4
"""The part of the memory that snapshots of states may take, in models with recurrent layers: 1 of 4."""


def build_caches(
    spec: KVCacheSpec,
    num_bytes: int,
    max_num_seqs: int,
    *,
    prefix_caching: bool,
    gang: Gang | None = None,
) -> tuple[KVCache, PrefixCache]:
    """A cache, and what finds prefixes in it, of at most `num_bytes` together.

    Args:
        gang: The members of a tensor-parallel decoder, each of which gets a cache of its own heads.

    Raises:
        EngineError: It would not hold one block per layer.
    """
    snapshot_bytes = num_bytes // SNAPSHOT_SHARE if spec.has_states and prefix_caching else 0
    num_reserved = int(any(spec.windows))  # see `Windows`
    num_blocks = (num_bytes - snapshot_bytes) // spec.block_bytes - num_reserved
    if num_blocks < spec.num_layers:
        least = (spec.num_layers + num_reserved) * spec.block_bytes
        raise EngineError(f"a KV cache of {num_bytes} bytes is too small; {least} hold {spec.block_size} tokens")
    size = {"num_blocks": num_blocks, "max_num_seqs": max_num_seqs}
    cache = KVCache(spec, **size) if gang is None else LeadingCache(spec, **size, gang=gang)
    return cache, PrefixCache(cache, enabled=prefix_caching, snapshot_bytes=snapshot_bytes)
