"""Read part of a Hugging Face checkpoint.

An encoder needs the tower and a decoder needs the language model. Each opens the safetensors index and reads only its
own tensors. Pickled weights (.bin, .pt) are refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import blake3
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mm.models.folder import BadCheckpoint, read_json, reading
from mm.models.locate import find, read_config
from mm.models.pages import release_pages

__all__ = ["BadCheckpoint", "find", "read_config"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weights_hash(folder: Path) -> str:
    """A hash over the bytes of all weights of a checkpoint: 64 hex digits. A gigabyte takes well below a second."""
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update_mmap(path)
    return digest.hexdigest()


def read_tensors(folder: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors whose key `rename` maps to a name, by that name. They are on the CPU, in the dtype of the file.

    Raises:
        BadCheckpoint: No safetensors file, or one that cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file, keys in tensor_files(folder).items():
        wanted = {key: name for key in keys if (name := rename(key)) is not None}
        if not wanted:
            continue
        with tensor_reader(folder, file) as reader:
            tensors.update({name: reader.get_tensor(key) for key, name in wanted.items()})
    return tensors


def tensor_shapes(folder: Path, rename: Callable[[str], str | None]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors whose key `rename` maps to a name, by that name. Only headers are read.

    Raises:
        BadCheckpoint: As `read_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, keys in tensor_files(folder).items():
        wanted = {key: name for key in keys if (name := rename(key)) is not None}
        with tensor_reader(folder, file) as reader:
            shapes.update({name: tuple(reader.get_slice(key).get_shape()) for key, name in wanted.items()})
    return shapes


def read_slices(
    folder: Path, rename: Callable[[str], str | None], parts: Mapping[str, tuple[slice, ...]]
) -> dict[str, Tensor]:
    """As `read_tensors`, but of each tensor only a part. What lies outside of it is not read.

    Args:
        parts: By name, a slice for each dimension.
    """
    tensors: dict[str, Tensor] = {}
    for file, keys in tensor_files(folder).items():
        wanted = {key: name for key in keys if (name := rename(key)) is not None}
        with tensor_reader(folder, file) as reader:
            # A copy, since a slice may be a view that keeps the whole tensor.
            tensors.update({name: reader.get_slice(key)[parts[name]].clone() for key, name in wanted.items()})
    return tensors


def read_rows(folder: Path, matches: Callable[[str], bool], rows: Sequence[int]) -> Tensor:
    """(len(rows), D): some rows of the one matrix whose key `matches`. Its other rows are not read.

    Raises:
        BadCheckpoint: No matrix matches, or several.
    """
    found = [(file, key) for file, keys in tensor_files(folder).items() for key in keys if matches(key)]
    if len(found) != 1:
        raise BadCheckpoint(str(folder), f"has {len(found)} matrices of token embeddings, not one")
    (file, key) = found[0]
    with tensor_reader(folder, file) as reader:
        matrix = reader.get_slice(key)
        width = matrix.get_shape()[1]
        return torch.cat([torch.empty(0, width), *(matrix[row : row + 1].float() for row in rows)])


def tensor_files(folder: Path) -> Mapping[str, list[str]]:
    """File name to the keys in it.

    Raises:
        BadCheckpoint: There are no safetensors files, or the index does not name those of the folder.
    """
    if (folder / INDEX).exists():
        return _indexed(folder)
    if (folder / SINGLE).exists():
        with tensor_reader(folder, SINGLE) as reader:
            return {SINGLE: list(reader.keys())}
    raise BadCheckpoint(str(folder), "holds no safetensors weights (.bin and .pt files are refused: convert them)")


def _indexed(folder: Path) -> Mapping[str, list[str]]:
    """As `tensor_files`, by the index of a checkpoint in several files."""
    weight_map: object = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadCheckpoint(str(folder), f"{INDEX}: weight_map is no object of keys and files; get the file again")
    files: dict[str, list[str]] = {}
    for key, file in cast("dict[str, object]", weight_map).items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadCheckpoint(str(folder), f"{INDEX}: weight_map.{key} names a file outside the folder: {file!r}")
        if not file.endswith(".safetensors"):
            what = f"{INDEX}: weight_map.{key} names {file}; only safetensors files are read (convert the others)"
            raise BadCheckpoint(str(folder), what)
        files.setdefault(file, []).append(key)
    if lost := [file for file in files if not (folder / file).is_file()]:
        raise BadCheckpoint(str(folder), f"lacks {few(lost)}, which {INDEX} names; download the rest of the checkpoint")
    return files


DEPTHS = ("num_hidden_layers", "depth", "num_layers")
"""Settings that say how many layers a module has."""


def check_depths(folder: Path) -> None:
    """Refuse more layers than the checkpoint has tensors, before anything of that size is built.

    Raises:
        BadCheckpoint: Names the setting.
    """
    num_tensors = sum(map(len, tensor_files(folder).values()))
    config = read_json(folder, "config.json")
    for part, settings in [("", config), *((f"{name}.", value) for name, value in config.items())]:
        for name in DEPTHS if isinstance(settings, dict) else ():
            depth = cast("dict[str, object]", settings).get(name)
            if isinstance(depth, int | float) and depth > num_tensors:
                what = f"config.json: {part}{name} is {depth}, but the checkpoint has {num_tensors} tensors"
                raise BadCheckpoint(str(folder), what)


class _TensorSlice(Protocol):
    """A tensor in a file, of which parts can be read."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


class TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> Sequence[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> _TensorSlice: ...


@contextlib.contextmanager
def tensor_reader(folder: Path, file: str) -> Generator[TensorFile]:
    """An open file of tensors."""
    with reading(folder, file), safe_open(folder / file, framework="pt") as reader:  # pyright: ignore[reportUnknownVariableType]
        yield cast("TensorFile", reader)


def load_module(
    module: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str, folder: Path
) -> None:
    """Load `tensors` into a module that was built in `without_weights`.

    Raises:
        BadCheckpoint: A weight is missing, left over, or of another shape.
    """
    check_tensors(module, tensors, folder)
    cast_to = {name: dtype if tensor.is_floating_point() else None for name, tensor in tensors.items()}
    on_device = {name: converted(tensor, device, cast_to[name]) for name, tensor in tensors.items()}
    module.load_state_dict(on_device, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if left := [name for name, tensor in _all_tensors(module) if tensor.is_meta]:
        raise BadCheckpoint(str(folder), f"is of an architecture with values that cannot be computed: {few(left)}")
    module.to(device)  # the buffers that no checkpoint holds


def converted(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """The tensor on a device and in a dtype. If that is another one, the file's pages are given back."""
    found = tensor.to(device, dtype)
    if found is not tensor:
        release_pages(tensor)
    return found


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextlib.contextmanager
def without_weights() -> Generator[None]:
    """What this thread builds here has parameters without memory.

    Buffers are computed: most of them, such as rotary frequencies or the scale of embeddings, are in no checkpoint.
    """
    builder = threading.get_ident()

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != builder:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check that `tensors` are the weights of a module.

    Raises:
        BadCheckpoint: A weight is missing, left over, of another shape, or no floating-point numbers.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {few(missing)}" if missing else f"has weights that this architecture does not: {few(extra)}"
        raise BadCheckpoint(str(folder), what)
    wrong = [name for name in expected if expected[name].shape != tensors[name].shape]
    if wrong:
        raise BadCheckpoint(str(folder), f"has other shapes than its config.json says: {few(wrong)}")
    floats = [name for name in expected if expected[name].is_floating_point()]
    if whole := [name for name in floats if not tensors[name].is_floating_point()]:
        what = f"has weights of {tensors[whole[0]].dtype}, such as quantised ones, which are not read: {few(whole)}"
        raise BadCheckpoint(str(folder), what)


def fill_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as position ids, which the meta device left empty.

    Modules of transformers fill them in `_init_weights`. Weights that are filled too are replaced by `load_module`.
    """
    for module in model.modules():
        if module._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage]
            module.to_empty(device=device)
            initialize = cast("Callable[[nn.Module], object]", model._init_weights)  # pyright: ignore[reportPrivateUsage]
            initialize(module)


def few(names: list[str], most: int = 3) -> str:
    """Some of the names, and how many more there are."""
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
