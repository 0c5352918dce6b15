"""A family without its decoder: vLLM holds the weights, we the chat template, the placeholders and the positions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mm.models.arithmetic import Arithmetic
from mm.models.family import CheckpointFamily
from mm.models.language import DecoderSource, LanguageModel, TextConfig
from mm.models.probe import names_in_pass


class DecoderFacts:
    """What a family asks of its language model to make prompts, without any weight.

    Text gets zeros as embeddings, since vLLM embeds it. Visual tokens stay as the encoder made them: vLLM scales
    nothing that is given as an embedding.
    """

    num_layers: int
    can_be_recorded = False

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        device: str,
        dtype: torch.dtype,
        source: DecoderSource | None = None,
    ) -> None:
        text: Any = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
        facts = Arithmetic.of(folder, text, names_in_pass(config))
        self.arithmetic = dataclasses.replace(facts, input_scale=1.0)
        self.config = cast(TextConfig, text)
        self.device, self.dtype = torch.device("cpu"), dtype
        self.vocab_size: int = text.vocab_size
        self.num_layers = self.config.num_hidden_layers

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) ids to (T, D) zeros."""
        return torch.zeros(len(token_ids), self.config.hidden_size, dtype=self.dtype)

    def as_input(self, embeddings: Tensor) -> Tensor:
        """The same embeddings."""
        return embeddings


def without_decoder(family: type[CheckpointFamily]) -> type[CheckpointFamily]:
    """The family's class with `DecoderFacts` in place of its language model. Errors name it as before."""
    own = {
        "language_class": cast("type[LanguageModel]", DecoderFacts),
        "__module__": family.__module__,
        "__qualname__": family.__qualname__,
    }
    return type(family.__name__, (family,), own)
