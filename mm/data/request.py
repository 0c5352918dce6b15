"""One request: messages, media, and what is asked of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.data.media import FrameSampling, Kind, Media
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import Positions
from mm.errors import InvalidRequest


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
    sampling: SamplingParams = field(default_factory=SamplingParams)
    vision: VisionOptions = field(default_factory=VisionOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
