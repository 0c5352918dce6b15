"""One request: its messages, its media, and the options of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mm.data.media import FrameSampling, Kind, Media
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import AskedPositions
from mm.errors import InvalidRequest
from mm.settings import setting, settings_of

ROLES = ("system", "user", "assistant", "tool")
"""Roles of messages, as chat templates know them."""
MAX_BYTES_PER_CHAR = 4
"""Of UTF-8."""


Detail = Literal["low", "high", "auto"]


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Literal text of a message. Nothing in it is ever read as a control or placeholder token."""

    text: str


@dataclass(frozen=True, kw_only=True)
class MediaPart:
    """Marks where in a message the request's `media[index]` belongs.

    Attributes:
        detail: How many visual tokens the item may have, as in OpenAI's API; "low" is at most a quarter of "high".
        max_visual_tokens: At most so many of the item's tokens enter the decoder.
    """

    index: int
    kind: Kind
    detail: Detail = "auto"
    max_visual_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation, or a whole prompt.

    Attributes:
        fields: JSON object with what a template may read of the turn beside its content: `tool_calls`, `tool_call_id`
            and `name`. Empty where there is none.
        context: JSON object with what a template gets beside the messages: `tools`, a list of OpenAI's function tools,
            and `options`, further variables. Only the first message has it.
        is_prompt: The message is the whole prompt. No template is applied, and control tokens in its text are such.
        token_ids: Such a prompt as token ids, in place of text.
    """

    role: str
    parts: tuple[TextPart | MediaPart, ...]
    fields: str = ""
    context: str = ""
    is_prompt: bool = False
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """How long the text of a conversation may be.

    Attributes:
        max_context_tokens: Positions of the model.
        max_chars: Characters that can be so many tokens.
        num_token_ids: Tokens that a prompt may be made of.
    """

    max_context_tokens: int
    max_chars: int
    num_token_ids: int

    def check(self, messages: Sequence[Message]) -> None:
        """Refuse a conversation by its number of characters.

        Raises:
            InvalidRequest: It has more than `max_chars`.
        """
        if (num_chars := _num_chars(messages)) > self.max_chars:
            raise text_too_long(num_chars, self.max_chars, self.max_context_tokens)

    def are_far_from(self, messages: Sequence[Message]) -> bool:
        """Whether a text so short fits, even if each byte of each character is a token."""
        return _num_chars(messages) * MAX_BYTES_PER_CHAR < self.max_context_tokens


def _num_chars(messages: Sequence[Message]) -> int:
    texts = sum(len(part.text) for message in messages for part in message.parts if isinstance(part, TextPart))
    return texts + sum(len(message.fields) + len(message.context) for message in messages)


def text_too_long(num_chars: int, max_chars: int, max_context_tokens: int) -> InvalidRequest:
    """The error of a text that has more characters than can be tokens of the model's context."""
    message = (
        f"the text has {num_chars} characters, but this model's context of {max_context_tokens} tokens holds at most "
        f"{max_chars}; shorten the prompt"
    )
    return InvalidRequest(message, "messages", "context_length_exceeded")


@dataclass(frozen=True, kw_only=True)
class VisionOptions:
    """What a request asks of its visual tokens.

    Attributes:
        reducer: A reducer specification such as "divprune:keep_ratio=0.25"; None takes the server's default.
        keep_ratio: Tokens kept / tokens in, for the one reducer named. Without a name it is for the default reducer if
            that takes a ratio, and for "divprune" otherwise.
        return_map: Report which tokens were kept.
        return_timings: Report the seconds of each stage, and the bytes of the KV cache.
        max_visual_tokens: At most so many visual tokens of all items together enter the decoder. Each item keeps its
            share, and at least one.
        frames: Which frames of a clip the encoder gets; None takes the server's default.
        positions: "kept" leaves each token the position that it has in the unreduced prompt. "compact" numbers the
            tokens that enter the decoder anew, so that only they have to fit the context. "as_published" does what the
            authors of the reducer did, to reproduce their figures. None leaves the choice to the reducer, whose default
            is "kept".
    """

    reducer: str | None = setting(
        None, max_chars=500, help='Such as "divprune:keep_ratio=0.25"; the server\'s default if absent.'
    )
    keep_ratio: float | None = setting(
        None,
        above=0,
        max=1,
        help="Tokens kept / tokens in. Without a reducer, the server's default or divprune keeps them.",
    )
    positions: AskedPositions | None = setting(
        None,
        help="Whether positions are counted anew after dropped tokens, or as the reducer's authors had it; its own "
        "choice if absent.",
    )
    return_map: bool = setting(False, help="Report which tokens were kept.")
    return_timings: bool = setting(
        False, help="Report how many seconds each stage took, and the bytes of the KV cache at the first token."
    )
    max_visual_tokens: int | None = setting(
        None, min=1, max=1_000_000, help="At most so many visual tokens of all items together enter the decoder."
    )
    frames: FrameSampling | None = None


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What a request asks of drafting, as far as the operator allows it. It changes an answer's speed, not its text.

    Attributes:
        drafter: A drafter specification such as "copy" or "copy + recycle"; None takes the server's default.
        max_draft_tokens: Drafted tokens per step; 0 drafts nothing, None takes the server's limit.
    """

    drafter: str | None = setting(
        None, max_chars=500, help='One that the server allows, such as "copy", or "none"; its default if absent.'
    )
    max_draft_tokens: int | None = setting(
        None, min=0, max=255, help="Drafted tokens per step, up to the server's limit; 0 drafts nothing."
    )

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            if problem := one.problem(one.value_in(self)):
                name = f"speculation.{one.name}"
                raise InvalidRequest(f"{name} {problem}", name)


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """What one choice of a request gave before its decoder was lost.

    Attributes:
        token_ids: Its tokens so far.
        is_finished: Whether it needs no more of them.
    """

    token_ids: tuple[int, ...] = ()
    is_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question about some media. `messages` refer to `media` by index, each item exactly once and in order.

    Attributes:
        priority: Lower is served first; requests of one priority in order of arrival.
        timeout_s: Longest time until the last token; None leaves it to the server.
        cache_salt: Requests with different salts share no cached features and no cached prefix.
        emitted: One for each choice of a request that goes on at another decoder, which gives only what follows. A
            sampled request needs its seed then. Empty for a request that begins.
        prefix_keys: Names by which the sender wants to hear what a prefix cache holds of the prompt: up to each media
            item, and of the whole. See `PrefixCache.name`.
        num_images: Images of the whole prompt, where the request holds only some of its media.
    """

    request_id: str
    messages: tuple[Message, ...]
    media: tuple[Media, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    vision: VisionOptions = field(default_factory=VisionOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    emitted: tuple[Emitted, ...] = ()
    prefix_keys: tuple[str, ...] = ()
    num_images: int | None = None
