"""What an encoder promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mm.data.media import Image, Video
from mm.data.tokens import VisualTokens


class Encoder(Protocol):
    """Pixels to visual tokens.

    Attributes:
        provides: Names of the auxiliary features it can supply.
        kinds: What it takes: "image", "video" or both.
        fingerprint: Names model and preprocessing, for cache keys.
    """

    provides: frozenset[str]
    kinds: frozenset[str]
    fingerprint: str

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order; `aux_features` holds at least what `needs` names.

        One that provides `BLOCK_KEYS` also takes `merging`, the reducer inside the tower; it then supplies those
        auxiliary features that `BEHIND_MERGING` names.
        """
        ...


class ReadsText(Protocol):
    """What an encoder that provides `TEXT_EMBEDDINGS` has beside `Encoder`."""

    def embed_text(self, text: str) -> Tensor:
        """(T, D): the text's tokens as the model's decoder embeds them; no rows for no text."""
        ...
