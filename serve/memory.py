"""What bounds the memory of a server beside the weights of its model, in words."""

from __future__ import annotations

from collections.abc import Mapping

from mm.models.renderer import MAX_CHILDREN, MEMORY_BYTES
from serve.config import ServeConfig

MIB = 1 << 20


def memory_bounds(config: ServeConfig, kv_bytes: int) -> dict[str, int]:
    """Bytes that each bounded part of a process with both halves may hold at most.

    Args:
        kv_bytes: Size of the KV cache, in which the prefix cache lies.
    """
    return {
        "KV and prefix cache": kv_bytes,
        "feature cache": config.model.cache_bytes,
        "decoded pictures and clips": config.model.limits.max_decoded_bytes,
        "arriving bodies": max(config.max_arriving_bytes, config.max_body_bytes),
    }


def bounds_text(config: ServeConfig, kv_bytes: int) -> str:
    """One line for people; the children that decode clips and render templates are named apart."""
    bounds = memory_bounds(config, kv_bytes)
    clip, template = config.model.limits.decode_memory_bytes, MEMORY_BYTES
    return (
        f"memory beside the weights is bounded: {_list(bounds)}; together {_mib(sum(bounds.values()))}. Processes of "
        f"their own: {config.encode_workers} that decode clips with {_mib(clip)} each, and {MAX_CHILDREN} for chat "
        f"templates with {_mib(template)} each"
    )


def _list(bounds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in bounds.items())


def _mib(num_bytes: int) -> str:
    return f"{round(num_bytes / MIB)} MiB"
