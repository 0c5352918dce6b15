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
    return (
        f"memory beside the weights is bounded: {_list(bounds)}; together {_mib(sum(bounds.values()))}. Processes of "
        f"their own: {_clip_children(config)}, and {_template_children()}"
    )


def ray_bounds_text(config: ServeConfig) -> str:
    """The same for the processes of a server on Ray, each of which holds some of the parts."""
    gigabytes = config.model.kv_cache_gb
    bounds = memory_bounds(config, 0 if gigabytes is None else int(gigabytes * (1 << 30)))
    kv, body = "KV and prefix cache", "arriving bodies"
    media = {name: size for name, size in bounds.items() if name not in (kv, body)}
    cache = (
        f"{kv} of a share of the memory that is free when it starts"
        if gigabytes is None
        else f"{kv} {_mib(bounds[kv])}"
    )
    encoder = f"{_list(media)} ({_clip_children(config)})"
    decoder = f"{cache} ({_template_children()})"
    if config.split == "none":
        each = [f"decoder ({config.num_decoders}): {encoder}, {decoder}"]
    else:
        prefill = [f"prefill replica ({config.num_prefills}): {decoder}"] if config.split == "epd" else []
        each = [f"encoder ({config.num_encoders}): {encoder}", *prefill, f"decoder ({config.num_decoders}): {decoder}"]
    each.append(f"ingress ({config.num_ingress}): {body} {_mib(bounds[body])}")
    return f"memory beside the weights is bounded, for each {'; '.join(each)}"


def _clip_children(config: ServeConfig) -> str:
    return f"{config.encode_workers} that decode clips with {_mib(config.model.limits.decode_memory_bytes)} each"


def _template_children() -> str:
    return f"{MAX_CHILDREN} for chat templates with {_mib(MEMORY_BYTES)} each"


def _list(bounds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in bounds.items())


def _mib(num_bytes: int) -> str:
    return f"{round(num_bytes / MIB)} MiB"
