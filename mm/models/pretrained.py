"""The one way in which transformers reads a model folder: local files only, checked first, and never with its code."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    PretrainedConfig,
)

from mm.models.flat_config import with_text_settings
from mm.models.folder import check_folder, read_json, reading


class _FromFolder(Protocol):
    def from_pretrained(self, folder: Path, *, local_files_only: bool, trust_remote_code: bool) -> object: ...


class _FromConfig(Protocol):
    def from_config(self, config: object, *, trust_remote_code: bool, **options: str) -> nn.Module: ...


READS: dict[type, str] = {
    AutoConfig: "config.json",
    AutoImageProcessor: "processor_config.json or preprocessor_config.json",
    AutoVideoProcessor: "processor_config.json or video_preprocessor_config.json",
    AutoTokenizer: "tokenizer.json or tokenizer_config.json",
    AutoProcessor: "processor_config.json, or a file of its tokenizer or processors",
}
"""The files that a class of transformers reads, for errors."""


def from_folder(auto: type, folder: Path) -> object:
    """What a class of transformers, such as `AutoTokenizer`, makes of a folder.

    Raises:
        BadCheckpoint: The folder asks for code, or a file in it cannot be used.
    """
    check_folder(folder)
    reader = cast("_FromFolder", auto)
    with reading(folder, READS[auto]):
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def model_config(folder: Path) -> PretrainedConfig:
    """The configuration of the whole model, with all settings of config.json.

    Raises:
        BadCheckpoint: As `from_folder`.
    """
    config = from_folder(AutoConfig, folder)
    assert isinstance(config, PretrainedConfig)
    with reading(folder, "config.json"):
        return with_text_settings(config, read_json(folder, "config.json"))


def build_module(folder: Path, config: object, **options: str) -> nn.Module:
    """A module of transformers with random weights, from a part of the folder's configuration.

    Args:
        options: Such as `attn_implementation`.

    Raises:
        BadCheckpoint: There is no such module.
    """
    auto = cast("_FromConfig", AutoModel)
    with reading(folder, "config.json"):
        return auto.from_config(config, trust_remote_code=False, **options)
