"""From a media item of a request to pixels: fetch, then decode. Every way in goes through these two functions.

A cache that wants to skip decoding calls `fetch_item`, then `content_hash`, and `decode` only on a miss.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image as PilImage

from mm.config import SourcePolicy
from mm.data.media import FrameSampling, Image, Media, MediaFile, MediaSource, Video
from mm.errors import InvalidRequest, MediaError
from mm.media.image import decode_image, image_from_array, image_from_pil, stored_pixels
from mm.media.limits import MediaBudget
from mm.media.source import fetch
from mm.media.video import decode_video, draw_video


def fetch_item(item: Media, policy: SourcePolicy, budget: MediaBudget) -> MediaFile | Image | Video:
    """The item's encoded file, or its pixels if they are in memory. Draws the item from the budget.

    Raises:
        MediaError: See `fetch`; for pixels a limit of the budget. `param` is the item's.
        InvalidRequest: Pixels of a form that cannot be used.
    """
    if isinstance(item, MediaFile):
        return item
    if isinstance(item, Image):
        budget.take_item("image")
        budget.take_pixels("image", item.pixels.shape[1], item.pixels.shape[0])
        return item
    if isinstance(item, Video):
        draw_video(item.frames, item.duration_s, budget)
        return item
    if isinstance(item.source, PilImage.Image | np.ndarray):
        return _from_memory(item, budget)
    return MediaFile(kind=item.kind, data=fetch(item, policy, budget), param=item.param)


def _from_memory(item: MediaSource, budget: MediaBudget) -> Image:
    try:
        if item.kind == "image" and isinstance(item.source, PilImage.Image):
            return image_from_pil(item.source, budget)
        if item.kind == "image" and isinstance(item.source, np.ndarray):
            return image_from_array(item.source, budget)
    except MediaError as error:
        raise error.at(item.param) if item.param else error from None
    given = type(item.source).__name__
    raise InvalidRequest(f"cannot use a {given} as {item.kind}; give a path, bytes or a data: URL", item.param)


def decoded_size(file: MediaFile) -> float:
    """Pixels of a file as its header has them; infinite for a clip and 0 for what cannot be read."""
    return math.inf if file.kind == "video" else stored_pixels(file.data)


def decode(file: MediaFile, budget: MediaBudget, frames: FrameSampling) -> Image | Video:
    """The pixels of a fetched file. Draws them from the budget.

    Raises:
        MediaError: The file cannot be used; `param` is the item's.
        InvalidRequest: `frames` asks for no frames.
        EngineError: The video decoder cannot be started.
    """
    try:
        if file.kind == "image":
            return decode_image(file.data, budget)
        return decode_video(file.data, frames, budget)
    except MediaError as error:
        raise error.at(file.param) if file.param else error from None
