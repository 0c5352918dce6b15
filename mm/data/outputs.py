"""What an engine gives back: events of a request, token counts, seconds."""

from __future__ import annotations

from dataclasses import dataclass

from mm.data.media import Kind
from mm.data.tokens import Grid


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
        kv_bytes: Bytes of the KV cache of the first choice when its first token came, shared blocks included.
    """

    usage: Usage
    timings: Timings
    kept: tuple[KeptMap, ...] = ()
    reducer: str = "none"
    reducer_faults: tuple[str, ...] = ()
    kv_bytes: int = 0


Event = Delta | Summary
