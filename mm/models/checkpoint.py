"""Read part of a Hugging Face checkpoint.

An encoder needs the tower and a decoder needs the language model. Each opens the safetensors index and reads only its
own tensors. Pickled weights (.bin, .pt) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import blake3
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mm.errors import MmError, UnknownModel

SHIPPED = Path(__file__).parent / "weights"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class BadCheckpoint(MmError):
    """A model folder cannot be used."""

    code = "bad_checkpoint"

    def __init__(self, folder: str, message: str) -> None:
        super().__init__(folder, message)
        self.folder, self.message = folder, message

    def __str__(self) -> str:
        return f"the model folder {self.folder}: {self.message}"


def find(model: str | Path) -> Path:
    """The folder of a shipped model ("tiny"), of a local path, or of a hub name (downloaded by huggingface_hub).

    Raises:
        UnknownModel: It is none of these.
    """
    shipped = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []
    if str(model) in shipped:
        return SHIPPED / str(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadCheckpoint(str(path), "has no config.json; give the folder of a Hugging Face checkpoint")
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise UnknownModel(str(model), [*shipped, "a local folder", "a hub name such as owner/name"])
    return _download(str(model), shipped)


def _download(name: str, shipped: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))  # pyright: ignore[reportUnknownMemberType]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownModel(name, [*shipped, "a local folder", "a hub name that can be reached"]) from error


def weights_hash(folder: Path) -> str:
    """A hash over the bytes of all weights of a checkpoint: 64 hex digits. A gigabyte takes well below a second."""
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update_mmap(path)
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        BadCheckpoint: It is not a JSON object, or needs code of its own (`auto_map`), which is never run.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(str(folder), "config.json cannot be read") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadCheckpoint(str(folder), "config.json names no model_type")
    if "auto_map" in config:
        raise BadCheckpoint(str(folder), "needs its own Python code (auto_map), which is never run here")
    return cast("dict[str, Any]", config)


def read_tensors(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors whose key `rename` maps to a name, by that name. They are on the CPU, in the dtype of the file.

    Raises:
        BadCheckpoint: No safetensors file, or one that cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file, keys in _files(folder).items():
        wanted = {key: name for key in keys if (name := rename(key)) is not None}
        if not wanted:
            continue
        with _open(folder / file) as reader:
            tensors.update({name: reader.get_tensor(key) for key, name in wanted.items()})
    return tensors


def read_rows(folder: Path, matches: Callable[[str], bool], rows: Sequence[int]) -> Tensor:
    """(len(rows), D): some rows of the one matrix whose key `matches`. Its other rows are not read.

    Raises:
        BadCheckpoint: No matrix matches, or several.
    """
    found = [(file, key) for file, keys in _files(folder).items() for key in keys if matches(key)]
    if len(found) != 1:
        raise BadCheckpoint(str(folder), f"has {len(found)} matrices of token embeddings, not one")
    (file, key) = found[0]
    with _open(folder / file) as reader:
        matrix = reader.get_slice(key)
        width = matrix.get_shape()[1]
        return torch.cat([torch.empty(0, width), *(matrix[row : row + 1].float() for row in rows)])


def _files(folder: Path) -> Mapping[str, list[str]]:
    """File name to the keys in it."""
    if (folder / INDEX).is_file():
        files: dict[str, list[str]] = {}
        for key, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
            if Path(file).name != file:
                raise BadCheckpoint(str(folder), f"{INDEX} names a file outside the folder")
            files.setdefault(file, []).append(key)
        return files
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as reader:
            return {SINGLE: list(reader.keys())}
    raise BadCheckpoint(str(folder), "holds no safetensors weights (.bin and .pt files are refused: convert them)")


class _TensorSlice(Protocol):
    """A tensor in a file, of which parts can be read."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: slice) -> Tensor: ...


class _TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> Sequence[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> _TensorSlice: ...


def _open(path: Path) -> AbstractContextManager[_TensorFile]:
    return cast("AbstractContextManager[_TensorFile]", safe_open(path, framework="pt"))


def load_module(
    module: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str, folder: Path
) -> None:
    """Load `tensors` into a module that was built on the meta device.

    Raises:
        BadCheckpoint: A weight is missing, left over, or of another shape.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {_few(missing)}" if missing else f"has weights that this architecture does not: {_few(extra)}"
        raise BadCheckpoint(str(folder), what)
    wrong = [name for name in expected if expected[name].shape != tensors[name].shape]
    if wrong:
        raise BadCheckpoint(str(folder), f"has other shapes than its config.json says: {_few(wrong)}")
    module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as position ids, which the meta device left empty.

    Modules of transformers fill them in `_init_weights`. Weights that are filled too are replaced by `load_module`.
    """
    for module in model.modules():
        if module._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage]
            module.to_empty(device=device)
            initialize = cast("Callable[[nn.Module], object]", model._init_weights)  # pyright: ignore[reportPrivateUsage]
            initialize(module)


def _few(names: list[str], most: int = 3) -> str:
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
