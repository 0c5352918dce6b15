"""Makes a KV cache of a given size."""

from __future__ import annotations

from mm.engine.kv_cache.blocks import KVCache
from mm.errors import EngineError
from mm.models.kv_cache_spec import KVCacheSpec


def build_cache(spec: KVCacheSpec, num_bytes: int, max_num_seqs: int) -> KVCache:
    """A cache of at most `num_bytes`.

    Raises:
        EngineError: It would not hold one block per layer.
    """
    num_blocks = num_bytes // spec.block_bytes
    if num_blocks < spec.num_layers:
        least = spec.num_layers * spec.block_bytes
        raise EngineError(f"a KV cache of {num_bytes} bytes is too small; {least} hold {spec.block_size} tokens")
    return KVCache(spec, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
