"""The requests that the page sends: a question about a picture or a clip, with the turns before it.

The body is that of `POST /v1/chat/completions`; it holds nothing that a client of that route could not send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm.data.media import Kind
from serve.client import media_part


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file as it is sent: its own bytes, not encoded again."""

    name: str
    mime: str
    data: bytes

    @property
    def kind(self) -> Kind:
        return "image" if self.mime.startswith("image/") else "video"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An earlier question and its answer.

    Attributes:
        upload: What the question brought; None where it was about what came before.
    """

    text: str
    answer: str
    upload: Upload | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, after the turns before it.

    Attributes:
        upload: None only where an earlier turn has one.
        turns: Oldest first.
        reducer: A reducer specification; empty leaves the choice to the server.
        keep_ratio: Sent only when set; for a specification that holds its own ratios leave it None.
        num_frames: Frames of a clip; not sent without one.
        drafter: One that the server offers; None leaves the choice to it.
        salt: Shares nothing that is cached with questions of another salt, so that all sides of a comparison are
            cold. Empty shares.
    """

    text: str
    upload: Upload | None
    turns: tuple[Turn, ...] = ()
    reducer: str = "none"
    keep_ratio: float | None = None
    drafter: str | None = None
    num_frames: int = 8
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 64
    salt: str = ""

    @property
    def uploads(self) -> tuple[Upload, ...]:
        """Those of all turns, in the order in which the model gets them."""
        return tuple(one for one in (*(turn.upload for turn in self.turns), self.upload) if one is not None)

    def body(self, model: str, media_urls: tuple[str, ...] | None = None) -> dict[str, Any]:
        """The request's JSON object. `media_urls` stand in for the data URLs of `uploads`."""
        vision: dict[str, Any] = {"return_map": True, "return_timings": True}
        if self.reducer:
            vision["reducer"] = self.reducer
        if self.keep_ratio is not None:
            vision["keep_ratio"] = self.keep_ratio
        if any(upload.kind == "video" for upload in self.uploads):
            vision["num_frames"] = self.num_frames
        drafting = {"drafter": self.drafter} if self.drafter is not None else {}
        salted = {"cache_salt": self.salt} if self.salt else {}
        return salted | {
            "model": model,
            "messages": self._messages(media_urls),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "vision": vision,
            "speculation": drafting | {"return_accepted": True},
        }

    def _messages(self, media_urls: tuple[str, ...] | None) -> list[dict[str, Any]]:
        urls = None if media_urls is None else iter(media_urls)

        def asked(text: str, upload: Upload | None) -> dict[str, Any]:
            content: list[dict[str, Any]] = [{"type": "text", "text": text}]
            if upload is not None:
                media = media_part(upload.kind, upload.mime, upload.data)
                if urls is not None:
                    media[f"{upload.kind}_url"] = {"url": next(urls)}
                content.insert(0, media)
            return {"role": "user", "content": content}

        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            messages += [asked(turn.text, turn.upload), {"role": "assistant", "content": turn.answer}]
        return [*messages, asked(self.text, self.upload)]
