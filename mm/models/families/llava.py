"""LLaVA: a tower's tokens in the place of `<image>`, one-dimensional positions, a Llama-like decoder.

Covers checkpoints of model_type "llava" in Hugging Face format, the shipped model among them. A checkpoint whose
config.json names a `video_token_id` also takes clips: all frames' tokens, frame after frame, in that token's place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed, in_sequence


class Llava(CheckpointFamily):
    """Decoder side of a LLaVA checkpoint: language model, tokenizer, template and splice.

    Args:
        folder: Checkpoint in Hugging Face format.
        device, dtype: Where and in what the language model lives.
    """

    model_types: ClassVar[frozenset[str]] = frozenset({"llava"})

    def placeholders(self) -> Mapping[int, Kind]:
        found: dict[int, Kind] = {self.config.image_token_id: "image"}
        if getattr(self.config, "video_token_id", None) is not None:
            found[self.config.video_token_id] = "video"
        return found

    def place(self, tokens: VisualTokens) -> Placed:
        return in_sequence(tokens)
