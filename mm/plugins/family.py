"""What a model family promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mm.data.request import Message
from mm.data.tokens import Prompt, VisualTokens


class Family(Protocol):
    """What one model family knows beyond its decoder layers: template, placeholders, positions, splice."""

    max_context_tokens: int
    eos_token_ids: frozenset[int]

    def splice(self, messages: Sequence[Message], visual: Sequence[VisualTokens]) -> Prompt:
        """The prompt's rows, in which every placeholder has become its item's kept tokens."""
        ...
