"""What an evaluation asks, and the backends that answer: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from mm.data.media import Kind


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """One question about one image or clip."""

    item_id: str
    question: str
    media: bytes = field(repr=False)
    media_type: str

    @property
    def kind(self) -> Kind:
        return "image" if self.media_type.startswith("image/") else "video"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a question. The counts are 0 when the backend does not report them."""

    text: str
    num_visual_tokens_in: int = 0
    num_visual_tokens_kept: int = 0


class Backend(Protocol):
    """Answers questions about media, greedily."""

    def metadata(self) -> dict[str, Any]:
        """What answers, ready for JSON and the same in every run."""
        ...

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        """Replies in the order of the requests.

        Args:
            reducer: A specification; None leaves the choice to the backend.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it is not used again."""
        ...
