"""What a device can do: whether bfloat16 is fast, and how much memory the KV cache may take."""

from __future__ import annotations

import os

import torch

from mm.errors import InvalidOption
from mm.models.kv_cache_spec import KVCacheSpec

GIB = 1 << 30
CPU_SHARE, GPU_SHARE = 0.25, 0.9
"""Shares of the free memory that the KV cache takes unless its size is given."""


def resolved(device: str) -> str:
    """The torch device that "auto" stands for in this process; any other device as it is."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or that this machine does not have.

    Raises:
        InvalidOption: Says which ones torch can use.
    """
    try:
        torch.empty(0, device=resolved(device))
    except (RuntimeError, AssertionError) as error:
        what = f"was {device!r}, which torch cannot use here; try auto, cpu, cuda or cuda:1"
        raise InvalidOption("model", "device", what) from error


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies faster in bfloat16 than in float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.startswith("cpu") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[operator]


def kv_cache_bytes(shape: KVCacheSpec, max_tokens: int, gigabytes: float | None, gpu_share: float = 1.0) -> int:
    """Size of the KV cache in bytes: the given size, or a share of the free memory.

    Args:
        shape: Size of one token.
        max_tokens: Most tokens that the cache could ever hold per layer. A share is never larger than these need.
        gigabytes: The size in GiB. None takes a share.
        gpu_share: What of a GPU this process may use; others use the rest.

    Raises:
        InvalidOption: The given size is larger than the free memory.
    """
    free = _free_bytes(shape.device, gpu_share)
    needed = max_tokens * shape.token_bytes * shape.num_layers
    if gigabytes is None:
        return min(needed, int(free * (GPU_SHARE if shape.device.type == "cuda" else CPU_SHARE)))
    if gigabytes * GIB > free:
        raise InvalidOption("model", "kv_cache_gb", f"was {gigabytes}; {free / GIB:.1f} GiB are free on {shape.device}")
    return int(gigabytes * GIB)


def _free_bytes(device: torch.device, gpu_share: float) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, min(free, int(gpu_share * total) - torch.cuda.memory_reserved(device)))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
