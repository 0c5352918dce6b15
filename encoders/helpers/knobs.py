"""The settings of a checkpoint's own processor that make fewer visual tokens of an item.

transformers' processors have one of these: an area that pictures may have at most (`size` with `longest_edge` in
pixels, or `max_pixels`), a number of tokens (`max_soft_tokens`), or one of two ways to join patches (`downsample_mode`,
`use_token_compression`). Which of them a processor has is read off it; whether one did what was asked is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mm.models.media_processor import ProcessedItem

PIXELS = 4096
"""A `longest_edge` above it is an area, and not a side."""

SHARES = (1.0, 0.9, 0.75, 0.5)
"""Of the area that is asked for: whole cells may round it up."""

SOFT_TOKENS = (1120, 560, 280, 140, 70)
"""What Gemma's processors allow."""


def has_knob(processor: object) -> bool:
    """Whether a processor has a setting that makes fewer tokens than its own."""
    names = ("max_pixels", "max_soft_tokens")
    return (
        any(getattr(processor, name, None) is not None for name in names)
        or (getattr(processor, "size", None) or {}).get("longest_edge", 0) > PIXELS
        or getattr(processor, "downsample_mode", None) == "4x"
        or getattr(processor, "use_token_compression", None) is False
    )


def settings_for(processor: object, own: ProcessedItem, resolution: float) -> Iterator[Mapping[str, Any]]:
    """Settings that may make at most `resolution` of an item's own tokens, the one that makes most of them first.

    Args:
        own: The item as the processor makes it by itself.
    """
    for area in _areas(processor, own, resolution):
        if (getattr(processor, "size", None) or {}).get("longest_edge", 0) > PIXELS:
            yield {"size": {"shortest_edge": 1, "longest_edge": area}}
        elif getattr(processor, "max_pixels", None) is not None:
            yield {"min_pixels": 1, "max_pixels": area}
    most = getattr(processor, "max_soft_tokens", None)
    if most is not None:
        yield from ({"max_soft_tokens": count} for count in SOFT_TOKENS if count < most)
    if getattr(processor, "downsample_mode", None) == "4x":
        yield {"downsample_mode": "16x"}
    if getattr(processor, "use_token_compression", None) is False:
        yield {"use_token_compression": True}


def _areas(processor: object, own: ProcessedItem, resolution: float) -> Iterator[int]:
    """Pixels of the smaller item: of all its steps together, as some processors count, and then of one."""
    grid = own.layout.get(f"{own.kind}_grid_thw")
    side: int | None = getattr(processor, "patch_size", None)
    if grid is None or side is None:
        return
    steps, height, width = (int(length) for length in grid[0])
    frames = steps * int(getattr(processor, "temporal_patch_size", 1) or 1) if own.kind == "video" else 1
    for count in dict.fromkeys((frames, 1)):
        for share in SHARES:
            yield max(1, int(count * height * width * side**2 * resolution * share))
