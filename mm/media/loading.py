"""From where an item's bytes are to what a model looks at: fetch, then decode.

Caches that want to skip decoding call `fetch`, then `content_hash`, then decode only when they do not know the name.
"""

from __future__ import annotations

from mm.config import SourcePolicy, VideoDecoder
from mm.data.media import FrameSampling, Image, Kind, MediaSource, Video
from mm.errors import MediaError
from mm.media.image import decode_image
from mm.media.limits import MediaBudget
from mm.media.source import fetch
from mm.media.video import decode_video


def load(
    source: MediaSource,
    *,
    policy: SourcePolicy,
    budget: MediaBudget,
    frames: FrameSampling | None = None,
    video_decoder: VideoDecoder = "pyav",
) -> Image | Video:
    """Fetch and decode one item.

    Raises:
        MediaError: The item cannot be used; `param` is the source's.
        EngineError: The video decoder cannot be started.
    """
    data = fetch(source, policy, budget)
    try:
        return decode(source.kind, data, budget, frames or FrameSampling(), video_decoder)
    except MediaError as error:
        raise _located(error, source) from None


def decode(
    kind: Kind, data: bytes, budget: MediaBudget, frames: FrameSampling, video_decoder: VideoDecoder
) -> Image | Video:
    """Decode bytes that `fetch` brought."""
    if kind == "image":
        return decode_image(data, budget)
    return decode_video(data, frames, budget, decoder=video_decoder)


def _located(error: MediaError, source: MediaSource) -> MediaError:
    return error.at(source.param) if source.param else error
