"""Bytes to pixels, within limits.

Names are imported on first use. The video child imports this package, has to start fast and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.media.child_pool import ChildPool
    from mm.media.clip_reader import ClipReader
    from mm.media.hashing import content_hash, pixel_hash
    from mm.media.image import decode_image, image_from_array, image_from_pil
    from mm.media.limits import MediaBudget
    from mm.media.loading import decode, decoded_size, fetch_item
    from mm.media.memory import DecodeMemory
    from mm.media.source import fetch, is_remote
    from mm.media.video import decode_video, open_clip, prepare_decoder, video_from_array

_HOMES = {
    "ChildPool": "child_pool",
    "ClipReader": "clip_reader",
    "DecodeMemory": "memory",
    "MediaBudget": "limits",
    "content_hash": "hashing",
    "decode": "loading",
    "decode_image": "image",
    "decoded_size": "loading",
    "decode_video": "video",
    "fetch": "source",
    "fetch_item": "loading",
    "image_from_array": "image",
    "image_from_pil": "image",
    "is_remote": "source",
    "open_clip": "video",
    "pixel_hash": "hashing",
    "prepare_decoder": "video",
    "video_from_array": "video",
}

__all__ = [
    "ChildPool",
    "ClipReader",
    "DecodeMemory",
    "MediaBudget",
    "content_hash",
    "decode",
    "decode_image",
    "decode_video",
    "decoded_size",
    "fetch",
    "fetch_item",
    "image_from_array",
    "image_from_pil",
    "is_remote",
    "open_clip",
    "pixel_hash",
    "prepare_decoder",
    "video_from_array",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mm.media' has no attribute {name!r}")
    # Kept, so that this function is called once per name.
    value = getattr(import_module(f"mm.media.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
