"""What some decoders give each layer beside hidden states: vectors that follow from the tokens' ids (Gemma 4)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


class LayerInputs:
    """Computes these vectors as transformers' text model does.

    Args:
        decoder: The text model.
        placeholders: Ids that stand for media.
        padding: The id that transformers puts in their place.
    """

    def __init__(self, decoder: nn.Module, placeholders: list[int], padding: int) -> None:
        self._decoder: Any = decoder
        self._placeholders, self._padding = placeholders, padding

    @classmethod
    def of(cls, decoder: nn.Module, config: PretrainedConfig) -> LayerInputs | None:
        """None for a decoder that has no such inputs."""
        text: Any = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        if not hasattr(decoder, "project_per_layer_inputs") or not getattr(text, "hidden_size_per_layer_input", 0):
            return None
        found: list[Any] = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        return cls(decoder, [one for one in found if isinstance(one, int)], cast(int, text.pad_token_id or 0))

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """(T,) ids and (T, D) embeddings to (T, layers, d)."""
        is_media = torch.isin(token_ids, torch.tensor(self._placeholders, device=token_ids.device))
        ids = token_ids.masked_fill(is_media, self._padding).unsqueeze(0)
        embedded = embeddings.unsqueeze(0)
        own = self._decoder.get_per_layer_inputs(ids, embedded)
        return self._decoder.project_per_layer_inputs(embedded, own)[0]
