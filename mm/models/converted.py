"""Tensors of a checkpoint under the names that transformers' present model classes have for them.

Checkpoints were written under several names over the years, and some store what the model joins, such as the experts of
a layer one by one. transformers has a table of renamings and conversions for each model class. It is used here as
`from_pretrained` uses it, but only the wanted tensors are read.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,  # pyright: ignore[reportUnknownVariableType]
)

from mm.models.checkpoint import few, tensor_files, tensor_reader
from mm.models.folder import BadCheckpoint, reading

COMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids|masked_bias)$")
"""Buffers that older versions wrote and that are computed today."""


class ConvertedTensors:
    """Which tensors of a checkpoint make which tensors of a model.

    Args:
        folder: The checkpoint.
        model: The whole model; its parameters need no memory.

    Raises:
        BadCheckpoint: It has tensors that this model does not.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._folder, self._model = folder, model
        self._expected: dict[str, Tensor] = model.state_dict()
        transforms = cast("list[Any]", get_model_conversion_mapping(model))
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._converter_of = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._file_of = {key: file for file, keys in tensor_files(folder).items() for key in keys}
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._map()

    def _map(self) -> None:
        extra: list[str] = []
        for key in sorted(self._file_of, key=dot_natural_key):
            name, pattern = self._name_of(key)
            if name in self._expected:
                self._sources.setdefault(name, []).append((key, pattern))
            elif not self._is_ignored(key, name):
                extra.append(key)
        if extra:
            raise BadCheckpoint(str(self._folder), f"has weights that this architecture does not: {few(extra)}")

    def _name_of(self, key: str) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._expected)
        if name not in self._expected and key in self._expected:
            return rename_source_key(key, [], [], prefix, self._expected)
        return name, pattern

    def _is_ignored(self, key: str, name: str) -> bool:
        patterns = cast("list[str]", getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or [])
        return COMPUTED.search(key) is not None or any(re.search(one, name) or re.search(one, key) for one in patterns)

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors whose name in the model is `wanted`. They are on the CPU, in the dtype of the file."""
        found: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            readers: dict[str, Any] = {}

            def get(key: str) -> Tensor:
                file = self._file_of[key]
                if file not in readers:
                    readers[file] = stack.enter_context(tensor_reader(self._folder, file))
                return readers[file].get_tensor(key)

            for name, sources in self._sources.items():
                if wanted(name):
                    with reading(self._folder, sources[0][0]):
                        found |= self._converted(name, sources, get)
        return found

    def _converted(
        self, name: str, sources: list[tuple[str, str | None]], get: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        key, pattern = sources[-1]
        if pattern is None:
            return {name: get(key)}
        converter: Any = copy.deepcopy(self._converter_of[pattern])
        for key, pattern in sources:
            converter.add_tensor(name, key, pattern, get(key))
        made: dict[str, Any] = converter.convert(name, model=self._model, config=self._model.config)
        return {target: tensor[0] if isinstance(tensor, list) else tensor for target, tensor in made.items()}
