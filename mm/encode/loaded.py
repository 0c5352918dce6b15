"""The media of a request between its two steps in the encoder: loaded, and not yet encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mm.data.media import FrameSampling, Image, MediaFile, Prepared, Video
from mm.data.tokens import Encoded
from mm.encode.token_budget import TokenBudget
from mm.media import MediaBudget
from mm.plugins.spec import ReducerSpec


@dataclass(frozen=True, kw_only=True)
class LoadedItem:
    """One media item before the tower.

    Attributes:
        key: Its key in the feature cache.
        content: What the tower takes, or its tokens when the feature cache held them. Its file before it is decoded; a
            clip stays a file where the reducer takes it chunk by chunk.
        load_s: Seconds to fetch, decode and prepare it.
        num_media_bytes: Size of its encoded file.
        num_before_budget: Tokens that it would have without the request's budget, where a lower resolution reaches it.
    """

    key: str
    content: MediaFile | Image | Video | Prepared | Encoded
    load_s: float = 0.0
    num_media_bytes: int = 0
    num_before_budget: int = 0


@dataclass(frozen=True, kw_only=True)
class LoadedMedia:
    """The media of one request before the tower, and what is to be done with them.

    Attributes:
        reducer: The request's reducer, checked against policy and encoder.
        budget: What the media drew from. It holds the memory of pixels that could not be prepared.
        text: (T, D) embeddings of the user's last turn if the reducer reads it.
        clip_text: (S, P), those of CLIP's text tower.
        frames: Which frames of a clip are taken.
        tokens: How many visual tokens may enter the decoder.
    """

    items: tuple[LoadedItem, ...]
    reducer: ReducerSpec
    budget: MediaBudget
    text: Tensor | None = None
    clip_text: Tensor | None = None
    frames: FrameSampling = field(default_factory=FrameSampling)
    tokens: TokenBudget = field(default_factory=TokenBudget)
