"""What the encoders of Hugging Face checkpoints share: reading configuration, processor and weights.

Only the tensors of the modules that an encoder names are read, so an encoder process never holds the language model.
Nothing here knows an architecture.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from encoders.helpers.clip_space import CLIP_FOLDER, ClipSpace
from encoders.helpers.fingerprint import fingerprint
from encoders.helpers.loading import Rename, by_first_group, load_part
from encoders.helpers.text import TextEmbeddings
from mm.models.checkpoint import (
    BadCheckpoint,
    check_depths,
    find,
    read_config,
    weights_hash,
)
from mm.models.pretrained import from_folder, model_config


class HasSettings(Protocol):
    """A processor of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Its settings, as JSON."""
        ...


class CheckpointEncoder:
    """Base of encoders that belong to one or several `model_type`s of transformers.

    A subclass names them in `checkpoint_types`. Its `__init__` loads its modules with `load` and then calls `finish`.

    Args:
        folder: A checkpoint: a local folder, a shipped model's name or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder holds no such checkpoint.
    """

    checkpoint_types: ClassVar[tuple[str, ...]]
    fingerprint: str

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.path = find(folder)
        self.model_type: str = read_config(self.path)["model_type"]
        if self.model_type not in self.checkpoint_types:
            allowed = ", ".join(self.checkpoint_types)
            raise BadCheckpoint(str(self.path), f"is of model_type {self.model_type!r}, not one of {allowed}")
        self.device, self.dtype = torch.device(device), dtype
        check_depths(self.path)
        self.config: Any = model_config(self.path)
        self.image_processor: Any = from_folder(AutoImageProcessor, self.path)
        self._text = functools.cache(self._text_embeddings)
        self.clip_space = functools.cache(self._clip_space)
        self.has_clip = (self.path / CLIP_FOLDER / "config.json").is_file()

    def embed_text(self, text: str) -> Tensor:
        """(T, D) float32: the text's tokens as the decoder embeds them.

        Raises:
            InvalidRequest: The text is longer than the decoder's context.
        """
        return self._text()(text)

    def embed_clip_text(self, text: str) -> Tensor:
        """(S, P) float32: the text as CLIP's text tower embeds it. See `ClipSpace.embed`."""
        return self.clip_space().embed(text)

    def _clip_space(self) -> ClipSpace:
        width, positions = self.config.vision_config.hidden_size, self.config.get_text_config().max_position_embeddings
        return ClipSpace(self.path / CLIP_FOLDER, width, positions, self.device)

    def _text_embeddings(self) -> TextEmbeddings:
        return TextEmbeddings(self.path, self.config.get_text_config().max_position_embeddings, self.device)

    def load(
        self,
        build: Callable[[], nn.Module],
        key: re.Pattern[str],
        rename: Callable[[nn.Module, re.Pattern[str]], Rename] | None = None,
    ) -> nn.Module:
        """A module of the checkpoint with its weights, ready for inference.

        Args:
            build: Builds the module; called where tensors have no memory.
            key: Matches the keys of its tensors; the first group is the name inside the module.
            rename: Maps keys where that is not enough.

        Raises:
            BadCheckpoint: A weight is missing, left over, or of another shape.
        """

        def names(module: nn.Module) -> Rename:
            return by_first_group(key) if rename is None else rename(module, key)

        return load_part(self.path, build, names, self.device, self.dtype)

    def finish(self, modules: dict[str, nn.Module], *processors: HasSettings) -> None:
        """Compute the fingerprint, once all modules are loaded.

        Args:
            modules: All modules, by name.
            processors: Processors of transformers that are used beside the one for images.
        """
        settings = [
            json.dumps(processor.to_dict(), sort_keys=True, default=str)
            for processor in (self.image_processor, *processors)
        ]
        weights = [item for name, module in modules.items() for item in module.state_dict(prefix=f"{name}.").items()]
        config = (self.path / "config.json").read_text()
        clip = [weights_hash(self.path / CLIP_FOLDER)] if self.has_clip else []
        self.fingerprint = fingerprint(self.model_type, config, *settings, str(self.dtype), *clip, tensors=weights)
