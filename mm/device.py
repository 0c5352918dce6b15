"""What a device has: bfloat16 arithmetic, and room for the KV cache."""

from __future__ import annotations

import os

import torch

from mm.errors import InvalidOption
from mm.models.kv_cache_spec import KVCacheSpec

GIB = 1 << 30


CPU_SHARE = 0.25


GPU_SHARE = 0.9


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.startswith("cpu") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[operator]


def kv_cache_bytes(shape: KVCacheSpec, most_tokens: int, gigabytes: float | None) -> int:
    """Bytes of the cache: what was asked for, else a share of what is free, but never more than can be used.

    Args:
        most_tokens: Rows per layer that could ever be held at a time.
        gigabytes: In GiB; None takes a share.

    Raises:
        InvalidOption: More was asked for than there is.
    """
    free = _free_bytes(shape.device)
    most = most_tokens * shape.token_bytes * shape.num_layers
    if gigabytes is None:
        return min(most, int(free * (GPU_SHARE if shape.device.type == "cuda" else CPU_SHARE)))
    if gigabytes * GIB > free:
        raise InvalidOption("model", "kv_cache_gb", f"was {gigabytes}; {free / GIB:.1f} GiB are free on {shape.device}")
    return int(gigabytes * GIB)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
