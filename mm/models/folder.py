"""What is checked of a model folder before any library reads it: damage to its JSON files, and requests to run code.

A folder can ask libraries for code. `auto_map` names Python files, of the folder or of another repository, for a model,
a tokenizer or a processor. An attention implementation may be a kernel of the hub. A processor may name another
repository to load. All of that is refused, wherever in the folder it stands.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

from mm.config import REDUCERS_FOLDER
from mm.errors import MmError

DATA_FILES = ("tokenizer.json", "vocab.json")
"""JSON files that may be large and from which no library takes settings."""

SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
)
"""JSON files that transformers reads. They have to be right even where we do not need them."""

MAX_FILES = 10_000
MAX_NESTING = 100

CODE_KEYS = {
    "auto_map": "needs Python code of its own, which is never run here",
    "auto_mapping": "names Python modules to import, which is never done here",
    "custom_generate": "needs Python code of its own, which is never run here",
    "custom_pipelines": "needs Python code of its own, which is never run here",
    "audio_tokenizer": "loads another repository, which is never done here",
    "audio_tokenizer_name_or_path": "loads another repository, which is never done here",
    "use_pretrained_backbone": "loads another repository, which is never done here",
}
"""Keys by which a file asks a library to import or to load something beyond the folder."""

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Ends of the keys that may name a kernel of the hub."""


class BadCheckpoint(MmError):
    """A model folder cannot be used."""

    code = "bad_checkpoint"

    def __init__(self, folder: str, message: str) -> None:
        super().__init__(folder, message)
        self.folder, self.message = folder, message

    def __str__(self) -> str:
        return f"the model folder {self.folder}: {self.message}"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a folder.

    Raises:
        BadCheckpoint: It cannot be read, is not a JSON object, or holds a number that is not finite.
    """
    return _object(folder, name, _parse(folder, folder / name))


def _object(folder: Path, name: str, found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise BadCheckpoint(str(folder), f"{name} holds {_kind(found)} where an object is wanted; {REPLACE}")
    return cast("dict[str, Any]", found)


REPLACE = "correct the file or get it again"


def read_text(folder: Path, name: str) -> str:
    """One text file of a folder.

    Raises:
        BadCheckpoint: It cannot be read, or is not UTF-8.
    """
    try:
        return (folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadCheckpoint(str(folder), f"{name} is not UTF-8 at byte {error.start}; {REPLACE}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadCheckpoint(str(folder), f"{name} cannot be read: {reason}") from error


def _parse(folder: Path, path: Path) -> object:
    name = str(path.relative_to(folder))
    text = read_text(folder, name)
    try:
        found: object = json.loads(text)
    except RecursionError as error:
        raise BadCheckpoint(str(folder), f"{name} is nested too deeply; {REPLACE}") from error
    except ValueError as error:
        raise BadCheckpoint(str(folder), f"{name} is not JSON: {error}; {REPLACE}") from error
    for where, value in _values(found):
        if isinstance(value, float) and not math.isfinite(value):
            raise BadCheckpoint(str(folder), f"{name}: {where} is {value}, which is no finite number; {REPLACE}")
        if where.count(".") > MAX_NESTING:
            raise BadCheckpoint(str(folder), f"{name} is nested too deeply; {REPLACE}")
    return found


def _values(found: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every value in a JSON document with its path, such as `text_config.hidden_size`."""
    yield where, found
    pairs: Iterator[tuple[object, object]] = iter(())
    if isinstance(found, dict):
        pairs = iter(cast("dict[object, object]", found).items())
    elif isinstance(found, list):
        pairs = enumerate(cast("list[object]", found))
    if where.count(".") <= MAX_NESTING:
        for name, value in pairs:
            yield from _values(value, f"{where}.{name}" if where else str(name))


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names: list[tuple[type, str]] = [(list, "a list"), (str, "a text"), (int, "a number"), (float, "a number")]
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a file asks for code, or whose settings are damaged. Imports nothing.

    Sub-folders are checked too: of drafters, of adapters, of processors.

    Raises:
        BadCheckpoint: Names the file and the key.
    """
    for path in _files_below(folder):
        name = str(path.relative_to(folder))
        if path.suffix == ".py" and "custom_generate" in path.relative_to(folder).parts:
            raise BadCheckpoint(str(folder), f"{name} is Python code for generation, which is never run here")
        if path.suffix != ".json" or _is_data(path):
            continue
        if path.name in SETTINGS_FILES and path.relative_to(folder).parts[0] != REDUCERS_FOLDER:
            _refuse_code(folder, name, _object(folder, name, _parse(folder, path)))
        else:
            found: object = None
            with contextlib.suppress(BadCheckpoint):  # a damaged file that no library reads harms nobody else
                found = _parse(folder, path)
            _refuse_code(folder, name, found)


def _is_data(path: Path) -> bool:
    return path.name in DATA_FILES or path.name.endswith(".index.json")


def _files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and of the folders in it, links followed, each folder once."""
    seen: set[str] = set()
    count = 0
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted([*files, *(folder_name for folder_name in folders if folder_name in SETTINGS_FILES)]):
            count += 1
            if count > MAX_FILES:
                raise BadCheckpoint(
                    str(folder), f"holds more than {MAX_FILES} files; give the folder of one checkpoint"
                )
            yield Path(parent) / name
        folders.sort()


def _refuse_code(folder: Path, name: str, found: object) -> None:
    for where, value in _values(found):
        key = where.rpartition(".")[2]
        if key in CODE_KEYS and value:
            what = f"{name}: {where} {CODE_KEYS[key]}; use a checkpoint without it"
            raise BadCheckpoint(str(folder), what)
        if key.endswith(IMPLEMENTATIONS) and _names_repository(value):
            what = f"{name}: {where} names a kernel of the hub, which is never run here; remove it from the file"
            raise BadCheckpoint(str(folder), what)


def _names_repository(value: object) -> bool:
    return "/" in json.dumps(value)


@contextlib.contextmanager
def reading(folder: Path, what: str) -> Generator[None]:
    """Make whatever a library raises about a folder one line that names the file.

    Args:
        what: The files that the library reads, such as "config.json".
    """
    try:
        yield
    except MmError:
        raise
    except Exception as error:
        raise BadCheckpoint(str(folder), f"{what} cannot be used: {reason_of(error)}; {REPLACE}") from error


MAX_REASON_CHARS = 300


def reason_of(error: BaseException) -> str:
    """An error of a library in one short line, with its class where the text alone says nothing."""
    text = " ".join(str(error).split())
    if len(text) > MAX_REASON_CHARS:
        text = text[:MAX_REASON_CHARS] + "..."
    name = type(error).__name__
    return f"{name}: {text}" if text else name
