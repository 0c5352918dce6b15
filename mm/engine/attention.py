"""The one attention function through which every decoder layer reads and writes our KV cache.

It is registered with transformers under a name of ours; a model built with that name calls it from inside its own
layers, with queries and keys already rotated. The arithmetic is transformers' own SDPA path, which is what makes
float32 results equal to `generate` bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mm.engine.kv_cache import KVCache

ATTENTION = "mm_engine"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    mm_cache: KVCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append (1, H_kv, L, d) keys and values to the layer's cache and attend over all of it.

    New rows see the whole cache and, among themselves, only earlier ones: causal by order in the cache, whatever their
    positions. More than one new row on a cache that is not empty needs chunked prefill, which this path does not do.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = mm_cache.append(layer, key, value)
    num_new, num_all = key.shape[2], keys.shape[2]
    if 1 < num_new < num_all:
        raise AssertionError("several new rows on a cache that is not empty")
    output, _ = sdpa_attention_forward(module, query, keys, values, attention_mask, is_causal=num_new > 1, **kwargs)
    return output, None


AttentionInterface.register(ATTENTION, attend)
