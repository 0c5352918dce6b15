"""What an evaluation asks and hears, whoever answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from mm.data.media import Kind


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question about one medium."""

    item_id: str
    question: str
    media: bytes = field(repr=False)
    media_type: str

    @property
    def kind(self) -> Kind:
        return "image" if self.media_type.startswith("image/") else "video"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was answered. The counts are 0 when the answerer does not report them."""

    text: str
    num_visual_tokens_in: int = 0
    num_visual_tokens_kept: int = 0


class Answerer(Protocol):
    """Anything that answers questions about media, greedily."""

    def facts(self) -> dict[str, Any]:
        """What answers, JSON-ready and the same in every run."""
        ...

    def answers(self, asks: Iterable[Ask], reducer: str | None) -> Iterator[Reply]:
        """Replies in the order of the asks.

        Args:
            reducer: A specification; None leaves it to the answerer.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; it is not asked again."""
        ...
