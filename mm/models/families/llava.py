"""LLaVA: visual tokens replace `<image>`, positions are one-dimensional, and the decoder is like Llama's.

Covers checkpoints of model_type "llava" in Hugging Face format, among them the shipped model. A checkpoint whose
config.json has a `video_token_id` also takes clips: the tokens of all frames, in order, replace that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, cast

from mm.data.media import Kind
from mm.data.tokens import VisualTokens
from mm.models.family import CheckpointFamily, Placed, in_sequence


class _Config(Protocol):
    image_token_id: int


class Llava(CheckpointFamily):
    """The decoder side of a LLaVA checkpoint."""

    model_types: ClassVar[frozenset[str]] = frozenset({"llava"})

    @staticmethod
    def takes(raw: Mapping[str, Any]) -> bool:
        """Whether a config.json is of the kind with one run of tokens per picture, from a tower of fixed size."""
        tower: object = raw.get("vision_config")
        return not (isinstance(tower, Mapping) and cast("Mapping[str, object]", tower).get("model_type") == "pixtral")

    def placeholders(self) -> Mapping[int, Kind]:
        found: dict[int, Kind] = {cast(_Config, self.config).image_token_id: "image"}
        video_token_id: int | None = getattr(self.config, "video_token_id", None)
        if video_token_id is not None:
            found[video_token_id] = "video"
        return found

    def place(self, tokens: VisualTokens) -> Placed:
        return in_sequence(tokens)
