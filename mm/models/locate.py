"""Finds the folder of a model, and says early what is missing in it. Imports no torch, so that it is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import InvalidOption, UnknownModel
from mm.models.folder import BadCheckpoint, check_folder, read_json
from mm.models.shipped import SHIPPED, shipped_models

MAX_TEMPLATE_BYTES = 1 << 20
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
"""What of a model on the hub is downloaded beside its weights."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_KEYS = ("tokenizer_config.json", "processor_config.json")
"""Files that may hold a template under the key `chat_template`."""


def find(model: str | Path, *, weights: bool = True) -> Path:
    """The folder of a shipped model ("tiny"), of a local path, or of a hub name (downloaded by huggingface_hub).

    Args:
        weights: Download the weights too.

    Raises:
        UnknownModel: It is none of these.
        BadCheckpoint: It asks for code, or its settings are damaged; see `mm.models.folder`.
    """
    folder = _find(model, weights)
    check_folder(folder)
    return folder


def is_on_hub(model: str) -> bool:
    """Whether a model would be looked for on the hub."""
    return _local(model) is None


def _local(model: str | Path) -> Path | None:
    """The folder of a model that needs no download, or None for a hub name.

    Raises:
        UnknownModel: It is neither.
    """
    shipped = shipped_models()
    if str(model) in shipped:
        return SHIPPED / str(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadCheckpoint(str(path), "has no config.json; give the folder of a Hugging Face checkpoint")
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise UnknownModel(str(model), [*shipped, "a local folder", "a hub name such as owner/name"])
    return None


def _find(model: str | Path, weights: bool) -> Path:
    return _local(model) or _download(str(model), weights)


@dataclass(frozen=True, kw_only=True)
class PlannedDownload:
    """What a download would fetch.

    Attributes:
        sizes: Bytes of every file of the model, by name.
        num_missing_bytes: Bytes of those that are not here yet.
    """

    sizes: dict[str, int]
    num_missing_bytes: int

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


def planned_download(name: str) -> PlannedDownload:
    """What downloading a model of the hub would fetch. Nothing is fetched.

    Raises:
        UnknownModel: No such model can be reached.
        BadCheckpoint: It has no safetensors weights.
    """
    files = _snapshot(name, [*SETTINGS, *WEIGHTS[:1]], dry_run=True)
    sizes = {file.filename: file.file_size for file in files}
    if not any(path.endswith(".safetensors") for path in sizes):
        raise BadCheckpoint(name, NO_WEIGHTS)
    missing = sum(file.file_size for file in files if file.will_download)
    return PlannedDownload(sizes=sizes, num_missing_bytes=missing)


def _download(name: str, weights: bool) -> Path:
    return Path(_snapshot(name, [*SETTINGS, *(WEIGHTS[:1] if weights else ())]))


def _snapshot(name: str, patterns: list[str], **options: bool) -> Any:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=patterns, **options)  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownVariableType]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        allowed = [*shipped_models(), "a local folder", "a hub name that can be reached"]
        raise UnknownModel(name, allowed) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        BadCheckpoint: The folder cannot be used, see `check_folder`, or config.json names no model_type.
    """
    check_folder(folder)
    config = read_json(folder, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise BadCheckpoint(str(folder), "config.json names no model_type; give the folder of a whole checkpoint")
    return config


def read_template(path: str | None) -> str | None:
    """The text of a chat template's file, None without one.

    Raises:
        InvalidOption: It cannot be read, or holds nothing.
    """
    if path is None:
        return None
    try:
        raw = Path(path).expanduser().read_bytes()
        text = raw.decode()
    except OSError as error:
        raise InvalidOption("model", "chat_template", f"was {path!r}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidOption("model", "chat_template", f"was {path!r}, which is no UTF-8 text") from None
    if len(raw) > MAX_TEMPLATE_BYTES or not text.strip():
        what = f"was {path!r}, which is empty or larger than {MAX_TEMPLATE_BYTES} bytes"
        raise InvalidOption("model", "chat_template", what)
    return text


NO_WEIGHTS = "holds no safetensors weights (.bin and .pt files are refused: convert them)"
NO_TEMPLATE = "has no chat template; give one with --chat-template FILE (Jinja, as transformers writes it)"


def check_complete(folder: Path, template: str | None = None) -> None:
    """Refuse a folder without weights or without a chat template, by the names of its files.

    Args:
        template: A chat template that is used in place of the folder's.

    Raises:
        BadCheckpoint: Names what is missing.
    """
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise BadCheckpoint(str(folder), NO_WEIGHTS)
    if template is None and not has_template(folder):
        raise BadCheckpoint(str(folder), NO_TEMPLATE)


def has_template(folder: Path) -> bool:
    """Whether a folder holds a chat template."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES):
        return True
    files = (name for name in TEMPLATE_KEYS if (folder / name).is_file())
    return any(read_json(folder, name).get("chat_template") for name in files)
