"""Limits and settings that more than one stage reads. Frozen; checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mm.errors import InvalidOption

MiB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Bounds of the media of one request. Every path that decodes draws from one `MediaBudget` made of these.

    Attributes:
        max_images, max_videos: Items per request.
        max_image_bytes, max_video_bytes: Encoded size of one item.
        max_request_bytes: Encoded size of all items together.
        max_pixels: Pixels of one image or one frame, read from the header before decoding.
        max_total_pixels: Decoded pixels of all items and frames together.
        min_side_px: Shortest side of an image or frame.
        max_aspect: Longest over shortest side.
        max_sampled_frames: Frames of one clip that are handed on.
        max_decoded_frames: Frames of one clip that the decoder may produce.
        max_duration_s: Length of one clip.
        decode_wall_s, decode_cpu_s, decode_memory_bytes: What a video decoding process may use before it is killed.
    """

    max_images: int = 16
    max_videos: int = 2
    max_image_bytes: int = 20 * MiB
    max_video_bytes: int = 256 * MiB
    max_request_bytes: int = 256 * MiB
    max_pixels: int = 33_500_000
    max_total_pixels: int = 200_000_000
    min_side_px: int = 8
    max_aspect: float = 200.0
    max_sampled_frames: int = 128
    max_decoded_frames: int = 9_000
    max_duration_s: float = 3_600.0
    decode_wall_s: float = 20.0
    decode_cpu_s: int = 20
    decode_memory_bytes: int = 2048 * MiB


@dataclass(frozen=True, kw_only=True)
class SourcePolicy:
    """From where media may be read.

    Attributes:
        allowed_domains: Hosts that `http(s)` URLs may name; empty turns remote URLs off; ("*",) allows any public host.
        allow_paths: Whether local paths are read: true in Python and on the command line, never over HTTP.
        fetch_timeout_s: Whole download, redirects included.
        max_redirects: Each one is checked like the first address.
    """

    allowed_domains: tuple[str, ...] = ()
    allow_paths: bool = False
    fetch_timeout_s: float = 10.0
    max_redirects: int = 3


@dataclass(frozen=True, kw_only=True)
class SpeculationLimits:
    """What may be drafted ahead of the decoder.

    Attributes:
        drafter: Specification used when a request names none; "none" does not draft.
        drafters: Further ones that requests may name. A request may always turn drafting off.
        max_draft_tokens: Drafted tokens per answer and pass; requests may ask for fewer.
        control: Whether measured costs and acceptance decide how much is verified. Without it all that is drafted is:
            for tests and measurements.
    """

    drafter: str = "none"
    drafters: tuple[str, ...] = ()
    max_draft_tokens: int = 15
    control: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_draft_tokens <= 255:
            raise InvalidOption("model", "max_draft_tokens", f"was {self.max_draft_tokens}; it has to be 1 to 255")

    @property
    def offered(self) -> tuple[str, ...]:
        """All that a request may name."""
        return tuple(dict.fromkeys(("none", self.drafter, *self.drafters)))


OnError = Literal["fail", "keep_all"]
"""What happens to a request whose reducer is at fault: it fails, or it keeps all its tokens and reports the fault."""


@dataclass(frozen=True, kw_only=True)
class ReducerPolicy:
    """What requests may ask of reducers, and what happens when one is at fault.

    Attributes:
        allowed: Names that a request may use; empty allows all. The configured default is always allowed.
        min_keep_ratio: Requests may not go below this many visual tokens kept / in; None sets no bound.
        on_error: "fail" ends a request whose reducer raises or returns an invalid decision. "keep_all" keeps the tokens
            that it was to reduce, and reports the fault in the answer and the metrics.
    """

    allowed: tuple[str, ...] = ()
    min_keep_ratio: float | None = None
    on_error: OnError = "fail"

    def __post_init__(self) -> None:
        if self.min_keep_ratio is not None and not 0 < self.min_keep_ratio <= 1:
            given = f"was {self.min_keep_ratio}; it has to be above 0 and at most 1"
            raise InvalidOption("model", "min_keep_ratio", given)
        if self.on_error not in get_args(OnError):
            raise InvalidOption("model", "on_error", f"was {self.on_error!r}; it has to be 'fail' or 'keep_all'")


VideoDecoder = Literal["pyav", "decord"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is loaded and how; the same for Python, the in-process server and every Ray replica.

    Attributes:
        model: "tiny" (the model we ship), a local folder, or a hub name.
        device: A torch device name.
        dtype: "auto" (bfloat16 where the device computes in it, else float32), "float32", "bfloat16" or "float16".
        reducer: Specification used when a request names none.
        num_frames, fps: Frame sampling of clips when a request names none.
        video_decoder: "pyav", or "decord" for files the operator trusts.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        cache_bytes: Size of the encoder's feature cache; 0 turns it off.
        kv_cache_gb: Size of the decoder's KV cache in GiB; None takes a share of what the device has free.
        max_num_seqs: Answers decoded at a time.
        max_batch_tokens: Rows of one pass through the decoder; None takes 512 on a CPU, 4096 on a GPU.
        max_waiting: Requests that may wait for the decoder; more are refused.
        prefix_caching: Whether prompts begin with the rows that earlier ones left in the KV cache.
        speculation: What may be drafted ahead of the decoder, and by whom.
        cuda_graphs: Whether a GPU's decoding steps are recorded at start and replayed.
        compile: Whether the decoder's layers go through torch.compile; slow to start, and rarely worth it on a CPU.
        limits, sources: What media may be, and from where.
        reducers: What requests may ask of reducers.
    """

    model: str = "tiny"
    device: str = "cpu"
    dtype: str = "auto"
    reducer: str = "none"
    num_frames: int = 8
    fps: float | None = None
    video_decoder: VideoDecoder = "pyav"
    num_threads: int | None = None
    cache_bytes: int = 512 * MiB
    kv_cache_gb: float | None = None
    max_num_seqs: int = 64
    max_batch_tokens: int | None = None
    max_waiting: int = 256
    prefix_caching: bool = True
    speculation: SpeculationLimits = SpeculationLimits()
    cuda_graphs: bool = True
    compile: bool = False
    limits: MediaLimits = MediaLimits()
    sources: SourcePolicy = SourcePolicy()
    reducers: ReducerPolicy = ReducerPolicy()

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("video_decoder", get_args(VideoDecoder))):
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise InvalidOption("model", name, f"was {given!r}; allowed: {', '.join(allowed)}")
        for name in ("num_threads", "max_num_seqs", "max_batch_tokens", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidOption("model", name, f"was {value}; it has to be at least 1")
        if self.kv_cache_gb is not None and not self.kv_cache_gb > 0:
            raise InvalidOption("model", "kv_cache_gb", f"was {self.kv_cache_gb}; it has to be above 0")
