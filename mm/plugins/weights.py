"""The weights of learned reducers: where they are found, for which checkpoint they were trained, and their fingerprint.

The weights of a reducer are a folder:

    config.json          the card: `reducer` (its name), `base` (`checkpoint_fingerprint` of the model that they were
                         trained for), and what the reducer itself reads
    model.safetensors    the tensors of its own networks
    decoder.safetensors  where the decoder was adapted: the changed tensors, as the text model names them ("layers.0.…")

A text names them: NAME is the folder `reducers/NAME` of the model, anything with a slash is a folder or a hub name
(owner/name). `NAME@fingerprint` takes only weights of that fingerprint. Nothing but JSON and safetensors is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from mm.config import REDUCERS_FOLDER
from mm.errors import BadWeights

CARD, TENSORS, DECODER = "config.json", "model.safetensors", "decoder.safetensors"
FINGERPRINT_DIGITS = 16

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(kw_only=True, eq=False)
class ReducerWeights:
    """What was trained for one reducer and one checkpoint.

    Attributes:
        reducer: The reducer's name.
        name: As the text named them, without fingerprint.
        card: The content of config.json.
        tensors: Of the reducer's own networks, on the CPU.
        fingerprint: Names the content of all files. Part of every cache key that depends on the reducer.
        device: Where the networks compute.
        folder: Where they lie; None for weights that were never stored.
    """

    reducer: str
    name: str
    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    fingerprint: str
    device: str = "cpu"
    folder: Path | None = None
    _network: nn.Module | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def pinned(self) -> str:
        """The text that names these weights and no others."""
        return f"{self.name}@{self.fingerprint}"

    @property
    def adapts_decoder(self) -> bool:
        """Whether the decoder has other weights for requests with this reducer."""
        return self.folder is not None and (self.folder / DECODER).is_file()

    def decoder_tensors(self) -> dict[str, Tensor]:
        """The changed tensors of the decoder by their name in the text model. Read at every call.

        Raises:
            BadWeights: The file is damaged.
        """
        assert self.folder is not None
        return self._checked(_read_tensors(self.folder / DECODER, self.reducer, self.name))

    def number(self, key: str) -> float:
        """A number of the card.

        Raises:
            BadWeights: It is absent or no number.
        """
        value: object = self.card.get(key)
        if not _is_number(value):
            raise self.bad(f"have a card whose {key!r} is {value!r} and not a number; train them again")
        return float(cast(float, value))

    def count(self, key: str, least: int = 1) -> int:
        """A whole number of the card, of at least `least`.

        Raises:
            BadWeights: It is absent or something else.
        """
        value = self.number(key)
        if value != int(value) or value < least:
            raise self.bad(f"have a card whose {key!r} is {value:g} and not a whole number from {least} on")
        return int(value)

    def numbers(self, key: str, width: int = 1) -> list[tuple[float, ...]]:
        """A list of the card whose entries are `width` numbers each.

        Raises:
            BadWeights: It is absent or something else.
        """
        rows = [_as_list(entry) or [entry] for entry in _as_list(self.card.get(key))]
        if not rows or any(len(row) != width or not all(map(_is_number, row)) for row in rows):
            raise self.bad(f"have a card whose {key!r} is no list of {width} numbers each; train them again")
        return [tuple(float(value) for value in row) for row in rows]

    def network(self, build: Callable[[], ModuleT]) -> ModuleT:
        """The network with these weights in float32, for inference. Built once and shared by all who use the weights.

        Args:
            build: Builds it; the same for every caller.

        Raises:
            BadWeights: Tensors are missing, left over, of another shape, or not finite.
        """
        with self._lock:
            if self._network is None:
                self._network = self._load(build())
            return cast(ModuleT, self._network)

    def _load(self, module: nn.Module) -> nn.Module:
        expected = module.state_dict()
        if wrong := sorted(expected.keys() ^ self.tensors.keys()):
            raise self.bad(f"do not fit the reducer: {_few(wrong)} is missing or left over")
        if wrong := sorted(name for name in expected if expected[name].shape != self.tensors[name].shape):
            raise self.bad(f"have tensors of other shapes than their card says: {_few(wrong)}")
        self._checked(self.tensors)
        module.load_state_dict({name: tensor.float() for name, tensor in self.tensors.items()})
        return module.to(self.device).eval().requires_grad_(False)

    def _checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if wrong := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()):
            raise self.bad(f"are damaged: {_few(wrong)} holds values that are not finite")
        return dict(tensors)

    def bad(self, reason: str) -> BadWeights:
        """An error about these weights."""
        return BadWeights(self.reducer, self.name, reason, str(self.folder or ""))


def find_weights(reducer: str, text: str, model: Path | None, device: str = "cpu") -> ReducerWeights:
    """The weights that `text` names, for the checkpoint in `model`. One object however often they are named.

    Args:
        reducer: The reducer's name.
        text: See the head of this file.
        model: The checkpoint's folder; None where there is no decoder that weights could have been trained for.

    Raises:
        BadWeights: They are absent, damaged, of another reducer, or were trained for another checkpoint.
    """
    name, _, wanted = text.partition("@")
    found = _find(reducer, name, model, device)
    if wanted and wanted != found.fingerprint:
        raise found.bad(
            f"have the fingerprint {found.fingerprint} here and not {wanted}: use the same files everywhere"
        )
    return found


@functools.lru_cache(maxsize=64)
def _find(reducer: str, name: str, model: Path | None, device: str) -> ReducerWeights:
    if model is None:
        raise BadWeights(reducer, name, "cannot be used here: this encoder belongs to no model that they could fit")
    folder = _find_folder(reducer, name, model)
    card = _read_card(folder, reducer, name)
    if card.get("reducer") != reducer:
        raise BadWeights(reducer, name, f"are those of the reducer {card.get('reducer')!r}", str(folder))
    base, own = card.get("base"), checkpoint_fingerprint(model)
    if base != own:
        reason = (
            f"were trained for another checkpoint (its fingerprint is {_short(base)}, this model's is {_short(own)}); "
            "train them for this model, see docs/reducers.md"
        )
        raise BadWeights(reducer, name, reason, str(folder))
    return ReducerWeights(
        reducer=reducer,
        name=name,
        card=card,
        tensors=_read_tensors(folder / TENSORS, reducer, name),
        fingerprint=_hash_files(
            path for path in (folder / file for file in (CARD, TENSORS, DECODER)) if path.is_file()
        ),
        device=device,
        folder=folder,
    )


def forget() -> None:
    """Read weights again when they are named next."""
    _find.cache_clear()


def names_beside(model: Path) -> list[str]:
    """The learned reducers whose weights lie in a model's folder."""
    folder = model / REDUCERS_FOLDER
    return sorted(path.parent.name for path in folder.glob(f"*/{CARD}")) if folder.is_dir() else []


def is_beside_model(text: str) -> bool:
    """Whether a text names weights in the model's own folder, and not a folder or a hub name."""
    return "/" not in text and not text.startswith((".", "~"))


def _find_folder(reducer: str, name: str, model: Path) -> Path:
    if is_beside_model(name):
        folder = model / REDUCERS_FOLDER / name
        if (folder / CARD).is_file():
            return folder
        known = ", ".join(names_beside(model)) or "none"
        reason = (
            f"do not lie beside the model (trained for it: {known}); train some, see docs/reducers.md, or give "
            "weights=FOLDER or weights=owner/name"
        )
        raise BadWeights(reducer, name, reason, str(folder))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise BadWeights(reducer, name, "are not there: no such folder", str(path))
    return _download(reducer, name)


def _download(reducer: str, name: str) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CARD, "*.safetensors"]))  # pyright: ignore[reportUnknownMemberType]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = "are no folder, and no hub repository of that name can be reached"
        raise BadWeights(reducer, name, reason, str(error)) from error


def _read_card(folder: Path, reducer: str, name: str) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, ValueError) as error:
        raise BadWeights(reducer, name, f"have no readable {CARD}", str(folder)) from error
    if not isinstance(card, dict):
        raise BadWeights(reducer, name, f"have a {CARD} that is no JSON object", str(folder))
    return cast("dict[str, Any]", card)


def _read_tensors(path: Path, reducer: str, name: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = f"are damaged: {path.name} is absent or no safetensors file"
        raise BadWeights(reducer, name, reason, str(path.parent)) from error


# ── fingerprints ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Digest(Protocol):
    """What hashlib returns."""

    def update(self, data: bytes, /) -> None: ...


def checkpoint_fingerprint(folder: Path) -> str:
    """sha256 over the bytes of a checkpoint's safetensors files, in order of name: 64 hex digits.

    What lies in folders below, such as the weights of reducers and drafters, does not count.
    """
    files = sorted(folder.glob("*.safetensors"))
    return _fingerprint_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=16)
def _fingerprint_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        _update(digest, path)
    return digest.hexdigest()


def _hash_files(paths: Iterable[Path]) -> str:
    """Over names, sizes and bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        _update(digest, path)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def _update(digest: _Digest, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _short(fingerprint: object) -> str:
    return fingerprint[:12] if isinstance(fingerprint, str) else repr(fingerprint)


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
