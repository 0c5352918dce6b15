"""Where the weights of a decoder come from: their names in checkpoints, and the module that takes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mm.models.attention import ATTENTION
from mm.models.checkpoint import check_tensors, read_tensors, without_weights
from mm.models.pretrained import build_module

HEAD = "lm_head.weight"
HEAD_KEYS = (HEAD, "language_model.lm_head.weight")
TEXT_KEY = re.compile(
    r"^(?:language_model\.model\.|model\.language_model\.|language_model\.|(?:model\.)?text_model\."
    r"|model\.(?=embed_tokens\.|layers\.|norm\.))(.+)$"
)
"""Where checkpoints keep the text model. The last form is Qwen's, whose tower lies beside `model.` and not in it."""


class DecoderSource(Protocol):
    """Where a decoder comes from."""

    def decoder_tensors(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The decoder's weights by name, checked against its shapes, and the head's if the checkpoint has it."""
        ...

    def build_decoder(self) -> nn.Module:
        """The decoder without weights, attending through `mm.models.attention`."""
        ...


class TextModel:
    """The text model that transformers has for a configuration, with tensors under the names of `TEXT_KEY`."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self._folder, self._config = folder, config

    def decoder_tensors(self) -> tuple[dict[str, Tensor], Tensor | None]:
        tensors = read_tensors(self._folder, text_key)
        head = tensors.pop(HEAD, None)
        check_tensors(self.build_whole(), tensors, self._folder)
        return tensors, head

    def build_whole(self) -> nn.Module:
        """The decoder without memory, so that sizes in config.json are checked before anything gets some."""
        with torch.device("meta"):
            return build_module(self._folder, self._config, attn_implementation=ATTENTION)

    def build_decoder(self) -> nn.Module:
        with without_weights():
            return build_module(self._folder, self._config, attn_implementation=ATTENTION)


def text_key(key: str) -> str | None:
    if key in HEAD_KEYS:
        return HEAD
    match = TEXT_KEY.match(key)
    return match[1] if match else None
