"""Settings of a model: what is loaded, how it computes, and what requests may ask. Frozen, and checked when made.

Each setting is declared here once; see `mm.settings` for what is made of the declaration. The settings of a server are
in `serve.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mm.settings import build, check_settings, setting

MiB = 1 << 20
REDUCERS_FOLDER = "reducers"
"""Of a model's folder: it holds one folder per learned reducer."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")
ENGINES = ("native", "vllm")


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Bounds of the media of one request. Every path that decodes draws from one `MediaBudget` made of these."""

    max_images: int = setting(16, min=0, help="Images per request.")
    max_videos: int = setting(2, min=0, help="Clips per request.")
    max_image_bytes: int = setting(20 * MiB, min=0, help="Encoded size of one image, in bytes.")
    max_video_bytes: int = setting(256 * MiB, min=0, help="Encoded size of one clip, in bytes.")
    max_request_bytes: int = setting(256 * MiB, min=0, help="Encoded size of all media of a request, in bytes.")
    max_pixels: int = setting(
        33_500_000, min=0, help="Pixels of one image or frame, read from the header before it is decoded."
    )
    max_total_pixels: int = setting(200_000_000, min=0, help="Decoded pixels of all images and frames of a request.")
    max_decoded_bytes: int = setting(
        1024 * MiB,
        min=0,
        help="Memory that the decoded pixels of all requests of a process may take, in bytes. A request waits while "
        "others use it, and is refused if it needs more.",
    )
    min_side_px: int = setting(8, min=0, help="Shortest side of an image or frame, in pixels.")
    max_aspect: float = setting(200.0, min=1, help="Longest side over shortest side of an image or frame.")
    max_sampled_frames: int = setting(128, min=0, help="Frames of one clip that the encoder gets.")
    max_decoded_frames: int = setting(9_000, min=0, help="Frames of one clip that the video decoder may produce.")
    max_duration_s: float = setting(3_600.0, min=0, help="Length of one clip, in seconds.")
    decode_wall_s: float = setting(
        20.0, min=0, help="Seconds that decoding a clip may take, and as many again for every 128 sampled frames more."
    )
    decode_cpu_s: int = setting(
        20,
        min=0,
        help="CPU seconds that decoding a clip may take, and as many again for every 128 sampled frames more.",
    )
    decode_memory_bytes: int = setting(
        2048 * MiB, min=0, help="Memory that the process which decodes a clip may use, in bytes."
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")


@dataclass(frozen=True, kw_only=True)
class SourcePolicy:
    """From where media may be read.

    Attributes:
        allowed_domains: Hosts that `http(s)` URLs may name; empty turns remote URLs off; ("*",) allows any public host.
        allow_paths: Whether local paths are read: true in Python and on the command line, never over HTTP.
    """

    allowed_domains: tuple[str, ...] = setting(
        (), cli="allow_media_domain", help="Fetch media from this host; repeat. Without it remote URLs are off."
    )
    allow_paths: bool = setting(False, hidden=True, help="Read media from local paths.")
    fetch_timeout_s: float = setting(10.0, min=0, help="Seconds that one download may take, redirects included.")
    max_redirects: int = setting(
        3, min=0, help="Redirects of one download. Each address is checked as the first one is."
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")


@dataclass(frozen=True, kw_only=True)
class SpeculationLimits:
    """What may be drafted ahead of the decoder.

    Attributes:
        drafter: Specification used when a request names none; "none" does not draft.
        drafters: Further specifications that requests may name. A request may always turn drafting off.
        control: Whether measured cost and acceptance decide how many drafted tokens are verified. Without it all of
            them are: for tests and measurements.
    """

    drafter: str = setting(
        "none", help='Default drafter, such as "copy" or "copy + recycle"; `mm plugins` lists all drafters.'
    )
    drafters: tuple[str, ...] = setting(
        (), cli="allow_drafter", help="A further drafter that requests may ask for; repeat for several."
    )
    max_draft_tokens: int = setting(15, min=1, max=255, help="Drafted tokens per sequence and step at most.")
    control: bool = setting(True, hidden=True, help="Draft only as much as pays.")

    def __post_init__(self) -> None:
        check_settings(self, "model")

    @property
    def offered(self) -> tuple[str, ...]:
        """All that a request may name."""
        return tuple(dict.fromkeys(("none", self.drafter, *self.drafters)))


@dataclass(frozen=True, kw_only=True)
class PluginLimits:
    """How long plugins may take, and when one that fails is switched off; see `mm.plugins.calls`."""

    encoder_timeout_s: float = setting(120.0, above=0, help="Seconds that an encoder may take for a request.")
    reducer_timeout_s: float = setting(
        20.0, above=0, help="Seconds that a reducer outside the decoder may take for one item, and to be built."
    )
    step_timeout_s: float = setting(
        10.0, above=0, help="Seconds that a reducer or drafter may take inside a decoder step, for which all wait."
    )
    family_timeout_s: float = setting(30.0, above=0, help="Seconds that a prompt may take to be put together.")
    max_plugin_faults: int = setting(
        3, min=1, help="Faults in a row after which a reducer or drafter is switched off; too slow a step is enough."
    )
    plugin_retry_s: float = setting(60.0, above=0, help="Seconds after which a plugin that is off is tried again.")
    stall_timeout_s: float = setting(
        180.0, above=0, help="Seconds after which a decoder step that does not end makes /health fail."
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")


OnError = Literal["fail", "keep_all"]
TextAfterClip = Literal["highest", "longer_side"]
"""What happens to a request whose reducer is at fault: it fails, or it keeps all its tokens and reports the fault."""


@dataclass(frozen=True, kw_only=True)
class ReducerPolicy:
    """Which reducers requests may name, and what happens when a reducer fails.

    Attributes:
        allowed: Names that a request may use; empty allows all. The configured default is always allowed.
        weights: Folders and hub names whose weights a request may give to a learned reducer. Those that lie beside the
            model are always allowed.
        detail_low_tokens: Visual tokens that an item with detail "low" has at most; never more than a quarter.
        budget_by: How a budget in tokens is reached: by the reducer of this name, or "native" for a lower resolution.
        on_error: "fail" ends a request whose reducer raises or returns an invalid decision. "keep_all" keeps the tokens
            that it was to reduce, and reports the fault in the answer and the metrics.
    """

    allowed: tuple[str, ...] = setting(
        (), cli="allow_reducer", help="Requests may use this reducer; repeat. All reducers when not given."
    )
    weights: tuple[str, ...] = setting(
        (),
        cli="allow_weights",
        help="Requests may give a learned reducer the weights of this folder or hub name; repeat.",
    )
    min_keep_ratio: float | None = setting(
        None, above=0, max=1, help="Smallest share of the visual tokens that a request may keep."
    )
    detail_low_tokens: int = setting(
        85,
        min=1,
        help='Visual tokens of an item with "detail": "low" at most; never more than a quarter of its tokens.',
    )
    budget_by: str = setting(
        "divprune",
        max_chars=100,
        help="How budgets in tokens are reached: a reducer's name, or native: fewer tokens are made (models that take "
        "any size).",
    )
    on_error: OnError = setting(
        "fail",
        cli="lenient_reducers",
        flag="keep_all",
        help="When a reducer fails, keep all tokens and report the fault, instead of an error.",
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is loaded and how; the same for Python, the in-process server and every Ray replica.

    Attributes:
        speculation: What may be drafted ahead of the decoder, and by which drafters.
        limits, sources: How large media may be, and from where they are read.
        reducers: What requests may ask of reducers.
        plugins: How long plugins may take.
    """

    model: str = setting("tiny", help='"tiny" (the shipped model), a folder, or a hub name.')
    device: str = setting("cpu", help="Torch device: cpu, cuda, cuda:1, or auto: cuda where there is one, else cpu.")
    gpu_share: float = setting(1.0, above=0, max=1, hidden=True, help="Share of the GPU that this process may use.")
    dtype: str = setting(
        "auto", choices=DTYPES, help="auto (bfloat16 where the device computes in it, else float32), or a torch dtype."
    )
    tensor_parallel: int = setting(
        1, min=1, help="Processes, each with its own GPU, that share the decoder's weights and KV cache."
    )
    engine: str = setting(
        "native",
        choices=ENGINES,
        help="What computes the decoder: native (every reducer and drafter), or vllm, which has to be installed; "
        "`mm check MODEL` says what each can do.",
    )
    engine_args: str | None = setting(
        None,
        help='Further arguments of vLLM\'s engine, as JSON: \'{"quantization": "fp8"}\'.',
    )
    quantize: str = setting(
        "none",
        choices=QUANTIZATIONS,
        help="Keep the decoder's weights in 8 bits (int8), on a CPU: less memory, faster for all but tiny models, a "
        "little less exact.",
    )
    reducer: str = setting("none", help="Default reducer, such as divprune:keep_ratio=0.25, or a file of `mm tune`.")
    keep_ratio: float | None = setting(
        None, above=0, max=1, help="Default share of visual tokens kept; without a reducer divprune keeps them."
    )
    num_frames: int = setting(8, min=1, cli="frames", help="Frames sampled from a clip, evenly over its length.")
    fps: float | None = setting(None, above=0, help="Sample a clip by frames per second instead.")
    chat_template: str | None = setting(
        None, help="File with a chat template (Jinja), used in place of the checkpoint's own."
    )
    text_after_clip: TextAfterClip = setting(
        "highest",
        help="Where text after a clip goes on in Qwen2-VL and Qwen2.5-VL: after the clip's highest position, as the "
        "models were trained, or after its longer_side, as in transformers since 5.3.",
    )
    num_threads: int | None = setting(
        None, min=1, cli="threads", help="CPU threads per process; torch decides when not given."
    )
    cache_bytes: int = setting(512 * MiB, min=0, help="Size of the encoder's feature cache, in bytes; 0 turns it off.")
    kv_cache_gb: float | None = setting(
        None, above=0, help="Size of the decoder's KV cache, in GiB; a share of the free memory when not given."
    )
    max_num_seqs: int = setting(64, min=1, help="Sequences decoded at the same time.")
    max_batch_tokens: int | None = setting(
        None, min=1, help="Tokens of one decoder step; 512 on a CPU and 4096 on a GPU when not given."
    )
    max_waiting: int = setting(256, min=1, help="Requests that may wait for a decoder; more are refused.")
    prefix_caching: bool = setting(True, help="Reuse the KV cache of earlier prompts that begin in the same way.")
    cuda_graphs: bool = setting(True, help="On a GPU, record decoding steps at start and replay them.")
    compile: bool = setting(
        False, help="Run the decoder's layers through torch.compile. It starts slowly and rarely helps on a CPU."
    )
    skip_self_test: bool = setting(
        False, help="Serve a model that no test covers without comparing it with transformers at load."
    )
    speculation: SpeculationLimits = SpeculationLimits()
    limits: MediaLimits = MediaLimits()
    sources: SourcePolicy = SourcePolicy()
    reducers: ReducerPolicy = ReducerPolicy()
    plugins: PluginLimits = PluginLimits()

    def __post_init__(self) -> None:
        check_settings(self, "model")


def model_config(**settings: Any) -> ModelConfig:
    """A `ModelConfig` from settings by flat name, those of the dataclasses inside it included.

    `model_config(max_num_seqs=4, drafter="copy", max_pixels=1_000_000)`

    Raises:
        InvalidOption: A name is unknown, with the nearest one, or a value cannot be used.
    """
    return build(ModelConfig, settings, "model")
