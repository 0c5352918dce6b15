"""What an engine returns: the events of a request, token counts and timings."""

from __future__ import annotations

from dataclasses import dataclass

from mm.data.media import Kind
from mm.data.tokens import Cube, Grid


@dataclass(frozen=True, kw_only=True)
class KeptMap:
    """Which tokens of one media item were kept, before the decoder and inside it.

    Attributes:
        grid: (t, h, w) of the unreduced item; t above 1 in an image counts its crops, see `VisualTokens.crops`.
        kept: Ascending raster indices into that grid.
        cubes: The pieces of a clip, in order, where a reducer cut it.
    """

    kind: Kind
    grid: Grid
    kept: tuple[int, ...]
    cubes: tuple[Cube, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one request.

    Attributes:
        num_prompt_tokens: Tokens of the prompt that entered the decoder, after reduction.
        num_completion_tokens: Generated tokens of all choices.
        num_cached_tokens: Tokens of the prompt that the prefix cache held.
        num_image_tokens_in, num_video_tokens_in: Visual tokens that the encoder made.
        num_image_tokens_prompt, num_video_tokens_prompt: Those that entered the decoder.
        num_image_tokens_kept, num_video_tokens_kept: Those that were left after the last layer that dropped some.
        num_accepted_tokens: Draft tokens that became part of the output.
        num_rejected_tokens: Draft tokens that were verified and found wrong.
        num_drafts: Steps that verified a draft. Each gave one more token, which is not counted as accepted.
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
        """Tokens that a step with a draft gave, its bonus token included; None where nothing was drafted."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds per stage of one request.

    Attributes:
        load_s, encode_s, reduce_s: Stages of the encoder, summed over the media items.
        queue_s: From arrival at the engine until the request is first scheduled.
        prefill_s: From there to the first token.
        decode_s: From the first token to the last.
    """

    load_s: float = 0.0
    encode_s: float = 0.0
    reduce_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a token, from the raw logits: before penalties, temperature and truncation.

    Attributes:
        token_id: The token.
        token: Its text. Bytes that are no whole characters are written as escapes such as \\xf0.
        utf8: Its bytes in the text; None for a token that adds no text.
        logprob: Natural logarithm of its probability.
        top: The most probable tokens at this position, in order. The sampled token need not be among them.
    """

    token_id: int
    token: str
    utf8: bytes | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New text of one choice.

    Attributes:
        choice: Index of the choice.
        text: What the tokens make visible. It may be empty, since text that may become a stop string is held back.
        token_ids: The new tokens.
        finish_reason: "stop" or "length" in the last delta of a choice, None before.
        num_prompt_tokens: Tokens of the prompt that entered the decoder; only in the first delta of a request.
        logprobs: One for each of `token_ids` when the request asks for them, else empty.
        num_drafted: How many of `token_ids` a drafter had proposed.
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
        usage: Token counts.
        timings: Seconds per stage.
        kept: Per media item, which tokens were kept; empty unless the request asks for it.
        reducer: Canonical text of the reducer.
        reducer_faults: What reducers did wrong. The items that they should have reduced were kept whole.
        kv_bytes: Bytes of the KV cache of the first choice when its first token came, shared blocks included.
    """

    usage: Usage
    timings: Timings
    kept: tuple[KeptMap, ...] = ()
    reducer: str = "none"
    reducer_faults: tuple[str, ...] = ()
    kv_bytes: int = 0


Event = Delta | Summary
