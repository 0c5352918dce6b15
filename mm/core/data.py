"""Plain data that travels between the stages.

Nothing here computes anything of interest, knows a model, a plugin, HTTP or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mm.core.errors import InvalidRequest
from mm.core.sampling import ResponseFormat, Sampling

Kind = Literal["image", "video"]
Positions = Literal["kept", "compact"]
Grid = tuple[int, int, int]
"""Tokens along time, height and width: (t, h, w). An image has t = 1, or one step per crop of it."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A decoded picture.

    Attributes:
        pixels: uint8 RGB (H, W, 3).
        content_hash: Names the content for caches; framed over kind, size and bytes.
    """

    pixels: np.ndarray
    content_hash: str

    @property
    def kind(self) -> Kind:
        return "image"


@dataclass(frozen=True, kw_only=True)
class Video:
    """The sampled frames of a clip.

    Attributes:
        frames: uint8 RGB (T, H, W, 3), in order of time.
        timestamps_s: True presentation time of each frame, seconds from the clip's start, length T.
        duration_s: Length of the whole clip in seconds.
        content_hash: Names the content and the sampling for caches.
    """

    frames: np.ndarray
    timestamps_s: tuple[float, ...]
    duration_s: float
    content_hash: str

    @property
    def kind(self) -> Kind:
        return "video"


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """Where an item's bytes come from: bytes, a path, or a `data:`, `http:` or `https:` URL.

    Attributes:
        kind: What the sender says it is.
        source: Encoded file bytes, a local path, or a URL.
        param: The request field it came from, for error messages.
    """

    kind: Kind
    source: bytes | Path | str
    param: str | None = None


Media = MediaSource | Image | Video


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a clip are looked at.

    Attributes:
        num_frames: This many, evenly spread over the clip (fewer when it has fewer). Ignored with `fps`.
        fps: Frames per second of clip time; None samples by count.
        max_frames: Upper bound with `fps`; a clip that needs more is spread over this many.
    """

    num_frames: int = 8
    fps: float | None = None
    max_frames: int = 32


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """Visual tokens of one item, as the decoder would receive them.

    Attributes:
        embeddings: (N, D) in the model's dtype.
        positions: (N, 3) int64, each token's (t, h, w) cell in `grid`, in ascending raster order; a merged
            token has its anchor's.
        sizes: (N,) float32, how many original tokens each one stands for.
        grid: Cells of the unreduced item; N = t * h * w before reduction.
        kind: "image" or "video".
        evidence: What the tower observed, by name; per token where the last axis is N; dropped after reduction.
        seconds_per_step: Clip time between two steps along t; None for an image, or where the family does not ask.
        crops: Rows and columns of crops where the steps of an image are its crops, row by row, and then the whole
            image at the crops' size; None where the grid is the image's own.
        protected: (N,) bool, tokens that reducers inside the decoder have to keep; None protects none.
    """

    embeddings: Tensor
    positions: Tensor
    sizes: Tensor
    grid: Grid
    kind: Kind
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    seconds_per_step: float | None = None
    crops: tuple[int, int] | None = None
    protected: Tensor | None = None

    @classmethod
    def full(
        cls,
        embeddings: Tensor,
        grid: Grid,
        kind: Kind,
        evidence: Mapping[str, Tensor] | None = None,
        seconds_per_step: float | None = None,
        crops: tuple[int, int] | None = None,
    ) -> VisualTokens:
        """Unreduced tokens of `embeddings` (t*h*w, D) in raster order."""
        t, h, w = grid
        if embeddings.shape[0] != t * h * w:
            raise ValueError(f"{embeddings.shape[0]} embeddings do not fill a grid of {grid}")
        axes = [torch.arange(n, device=embeddings.device) for n in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        sizes = torch.ones(t * h * w, device=embeddings.device)
        return cls(
            embeddings=embeddings,
            positions=positions,
            sizes=sizes,
            grid=grid,
            kind=kind,
            evidence=evidence or {},
            seconds_per_step=seconds_per_step,
            crops=crops,
        )

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def num_tokens_in(self) -> int:
        """Tokens before any reduction."""
        t, h, w = self.grid
        return t * h * w

    @property
    def indices(self) -> Tensor:
        """(N,) int64: each token's raster index in the unreduced grid."""
        _, h, w = self.grid
        return (self.positions[:, 0] * h + self.positions[:, 1]) * w + self.positions[:, 2]

    def without_evidence(self) -> VisualTokens:
        return replace(self, evidence={})


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Literal text of a message. Nothing in it is ever read as a control or placeholder token."""

    text: str


@dataclass(frozen=True, kw_only=True)
class MediaPart:
    """A place in a message where the request's `media[index]` stands."""

    index: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[TextPart | MediaPart, ...]


@dataclass(frozen=True, kw_only=True)
class VisionOptions:
    """What a request asks of its visual tokens.

    Attributes:
        reducer: A reducer specification such as "divprune:keep_ratio=0.25"; None takes the server's default.
        keep_ratio: Tokens kept / tokens in, for the one reducer named (or the default one).
        return_map: Report which tokens were kept.
        return_timings: Report the seconds of each stage.
        frames: Which frames of clips are looked at; None takes the server's default.
        positions: "kept" leaves every row where it stands in the unreduced prompt; "compact" counts anew what enters
            the decoder, so that only that has to fit the context. None leaves it to the reducer, whose default is kept.
    """

    reducer: str | None = None
    keep_ratio: float | None = None
    positions: Positions | None = None
    return_map: bool = False
    return_timings: bool = False
    frames: FrameSampling | None = None


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What a request asks of drafting, within what the operator allows. It changes how fast an answer comes, not what.

    Attributes:
        drafter: A drafter specification such as "copy" or "copy + recycle"; None takes the server's default.
        max_draft_tokens: Drafted tokens per pass; 0 drafts nothing, None takes the server's limit.
    """

    drafter: str | None = None
    max_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        most = self.max_draft_tokens
        if self.drafter is not None and not isinstance(self.drafter, str):
            raise InvalidRequest("speculation.drafter has to be a drafter's name", "speculation.drafter")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            name = "speculation.max_draft_tokens"
            raise InvalidRequest(f"{name} was {most!r}; it has to be a whole number, at least 0", name)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question about some media. `messages` refer to `media` by index, each item exactly once and in order.

    Attributes:
        priority: Lower is served first; requests of one priority in order of arrival.
        timeout_s: Longest time until the last token; None leaves it to the server.
        cache_salt: Requests with different salts share no cached features and no cached prefix.
    """

    request_id: str
    messages: tuple[Message, ...]
    media: tuple[Media, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    vision: VisionOptions = field(default_factory=VisionOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True)
class EncodeTimings:
    """Seconds of one item's stages in the encoder. A cache hit has zeros for what it skipped."""

    load_s: float = 0.0
    encode_s: float = 0.0
    reduce_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One media item, ready to be spliced into a prompt: what travels from encoder to decoder.

    Attributes:
        key: Names what the tokens depend on: content, encoder, reducer, tenant. Empty for tokens nobody may share.
        fault: Why they are not reduced although they should be; empty when nothing went wrong.
    """

    tokens: VisualTokens
    timings: EncodeTimings = field(default_factory=EncodeTimings)
    cache_hit: bool = False
    key: str = ""
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the decoder's first layer receives.

    Attributes:
        token_ids: (L,) int64; visual rows hold the placeholder id.
        embeddings: (L, D).
        positions: (P, L) int64 with P = 1, or 3 for M-RoPE: the positions of the unreduced prompt at the kept rows,
            unless they were made compact.
        next_position: The position of the first generated token: where text behind the unreduced prompt goes on. With
            M-RoPE a clip may have reached further in time.
        is_visual: (L,) bool.
    """

    token_ids: Tensor
    embeddings: Tensor
    positions: Tensor
    next_position: int
    is_visual: Tensor

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    def compact(self) -> Prompt:
        """The same rows at positions 0, 1, 2, ...; only where positions have one row."""
        assert self.positions.shape[0] == 1, "counting through positions in time, height and width loses the grid"
        positions = torch.arange(self.length, device=self.positions.device).unsqueeze(0)
        return replace(self, positions=positions, next_position=self.length)


@dataclass(frozen=True, kw_only=True)
class KeptMap:
    """Which tokens of one media item were kept, before the decoder and inside it.

    Attributes:
        grid: (t, h, w) of the unreduced item; t above 1 in an image counts its crops, see `VisualTokens.crops`.
        kept: Ascending raster indices into that grid.
    """

    kind: Kind
    grid: Grid
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one request. `num_prompt_tokens` is what the decoder really saw, after reduction.

    Of visual tokens: `_in` came from the encoder, `_prompt` entered the decoder, `_kept` are left behind the last layer
    at whose input some were dropped. Of drafted tokens: `_accepted` are part of the answers, `_rejected` were verified
    for nothing; `num_drafts` passes verified them, and each gave a token of its own besides.
    """

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_image_tokens_in: int = 0
    num_image_tokens_prompt: int = 0
    num_image_tokens_kept: int = 0
    num_video_tokens_in: int = 0
    num_video_tokens_prompt: int = 0
    num_video_tokens_kept: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_drafts: int = 0

    @property
    def num_visual_tokens_in(self) -> int:
        return self.num_image_tokens_in + self.num_video_tokens_in

    @property
    def num_visual_tokens_kept(self) -> int:
        return self.num_image_tokens_kept + self.num_video_tokens_kept

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens that a pass with a draft gave, its own included; None where nothing was drafted."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds per stage of one request, summed over its media items."""

    load_s: float = 0.0
    encode_s: float = 0.0
    reduce_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How probable a token was under the model's own law, before penalties, temperature or truncation.

    Attributes:
        token: Its text; bytes that are no whole characters are written as escapes such as \\xf0.
        utf8: Its bytes in the answer; None for a token that gives no text.
        logprob: Natural logarithm of its probability.
        top: The most probable tokens at this place, in order; the chosen one need not be among them.
    """

    token_id: int
    token: str
    utf8: bytes | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New text of one choice. The last delta of a choice carries its finish reason ("stop" or "length").

    `num_prompt_tokens` is what the decoder saw of the prompt; the first delta of a request says it, for running totals.
    `logprobs` has one entry for each of `token_ids` when the request asks for them, and is empty otherwise.
    `num_drafted` of `token_ids` were drafted ahead and found right; the token that ends an answer is the pass's own.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_drafted: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The last event of a request.

    Attributes:
        reducer_faults: What reducers did wrong; what they were to reduce was kept whole.
    """

    usage: Usage
    timings: Timings
    kept: tuple[KeptMap, ...] = ()
    reducer: str = "none"
    reducer_faults: tuple[str, ...] = ()


Event = Delta | Summary

__all__ = [
    "Delta",
    "EncodeTimings",
    "Encoded",
    "Event",
    "FrameSampling",
    "Grid",
    "Image",
    "KeptMap",
    "Kind",
    "Media",
    "MediaPart",
    "MediaSource",
    "Message",
    "Positions",
    "Prompt",
    "Request",
    "ResponseFormat",
    "Sampling",
    "SpeculationOptions",
    "Summary",
    "TextPart",
    "Timings",
    "TokenLogprob",
    "Usage",
    "Video",
    "VisionOptions",
    "VisualTokens",
]
