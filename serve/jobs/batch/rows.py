"""A row of a job: its id, its media, and what it asks for itself. Rows come from tables, archives and folders alike."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mm.data.media import Kind
from mm.errors import MmError, nearest, shown
from mm.media.hashing import framed_hash
from serve.jobs.discover import EXTENSIONS

Id = int | str
COLUMNS = ("id", "image", "video", "media", "prompt", "reducer", "keep_ratio", "max_visual_tokens")
"""Names that a table's columns have here; `--columns id=uid` says where they are called otherwise."""
KINDS: Mapping[str, Kind] = {"image": "image", "video": "video"}
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
REMOTE = ("http://", "https://", "data:")


class BadRow(MmError):
    """A row cannot be used as it is."""

    code = "bad_row"


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A picture or a clip: its bytes, a path, or an address. Where the kind is None, the bytes decide."""

    kind: Kind | None
    data: bytes | None = None
    path: str | None = None
    url: str | None = None

    def loaded(self) -> Medium:
        """With its bytes, if it has a path, and with its kind.

        Raises:
            BadRow: It cannot be read.
        """
        data = self.data
        if data is None and self.path is not None:
            try:
                data = Path(self.path).read_bytes()
            except OSError as error:
                raise BadRow(f"{self.path} cannot be read: {error.strerror or error}") from None
        if data is not None and not data:
            raise BadRow("the file is empty")
        kind = self.kind or (kind_of(data) if data is not None else kind_of_name(self.url or ""))
        return Medium(kind=kind, data=data, path=self.path, url=self.url)

    @property
    def address(self) -> str:
        """What a request names it by: its address, or a data: URL."""
        if self.data is None:
            return str(self.url)
        guessed = mimetypes.guess_type(self.path or "")[0] or ""
        mime = guessed if guessed.startswith(f"{self.kind}/") else _mime(self.data, self.kind or "image")
        return f"data:{mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def fingerprint(self) -> str:
        """Names its content."""
        return framed_hash(
            "medium", "kind", str(self.kind), "data", self.data if self.data is not None else str(self.url)
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        id: Of the row, unique in its job.
        source: Where it came from, for people: a path relative to the job, or file and row.
        prompt: Asked in place of the job's prompts.
        vision: What it asks of its visual tokens, as the `vision` object of a request has it.
        body, url: A whole request and its path, of an OpenAI batch; then there are no media.
        facts: Further fields of its record.
        problem: Why the row cannot be used; such a row fails.
    """

    id: Id
    source: str = ""
    media: tuple[Medium, ...] = ()
    prompt: str | None = None
    vision: Mapping[str, Any] = field(default_factory=dict[str, Any])
    body: Mapping[str, Any] | None = None
    url: str = "/v1/chat/completions"
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""

    @property
    def key(self) -> str:
        """The id as text: 1 and "1" differ."""
        return json.dumps(self.id, ensure_ascii=False)


def parse_columns(given: str | None) -> dict[str, str]:
    """The name of each column, from a text such as "id=uid,image=jpg".

    Raises:
        BadRow: A name on the left is unknown.
    """
    found = {name: name for name in COLUMNS}
    for pair in filter(None, (given or "").split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or name not in COLUMNS or not column:
            allowed = ", ".join(COLUMNS)
            raise BadRow(f"--columns has {shown(pair)}{nearest(name, COLUMNS)}; write id=uid,image=jpg with {allowed}")
        found[name] = column
    return found


def row_of(values: Mapping[str, Any], columns: Mapping[str, str], number: Id, source: str, folder: str) -> Row:
    """The row that a table's values make.

    Args:
        number: Its id where it has none.
        folder: Paths are relative to it.
    """
    given = {name: values.get(column) for name, column in columns.items()}
    row_id = given["id"] if given["id"] is not None else number
    if isinstance(row_id, bool) or not isinstance(row_id, int | str):
        return Row(id=number, source=source, problem=f"its id was {shown(row_id)}; it has to be a number or a text")
    try:
        media = tuple(
            medium
            for name in ("image", "video", "media")
            if given[name] is not None
            for medium in _media(given[name], KINDS.get(name), folder)
        )
        prompt, vision = given["prompt"], _vision(given)
        if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
            raise BadRow(f"its prompt was {shown(prompt)}; it has to be a text")
        if not media:
            names = ", ".join(columns[name] for name in ("image", "video", "media"))
            raise BadRow(f"it has no media in the columns {names}")
    except BadRow as error:
        return Row(id=row_id, source=source, problem=str(error))
    return Row(id=row_id, source=source, media=media, prompt=prompt, vision=vision)


def _vision(given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("reducer", "keep_ratio", "max_visual_tokens")
    found: dict[str, Any] = {name: given[name] for name in names if given[name] not in (None, "")}
    for name, kind in (("keep_ratio", float), ("max_visual_tokens", int)):
        if isinstance(found.get(name), str):  # as CSV has it
            try:
                found[name] = kind(found[name])
            except ValueError:
                raise BadRow(f"its {name} was {shown(found[name])}; it has to be a number") from None
    return found


def _media(value: object, kind: Kind | None, folder: str) -> list[Medium]:
    """One medium or several: bytes, a path, an address, or a struct of bytes and path as datasets has it."""
    if isinstance(value, list | tuple):
        return [medium for item in cast("list[object]", value) for medium in _media(item, kind, folder)]
    if isinstance(value, bytes):
        return [Medium(kind=kind, data=value)]
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        if isinstance(given.get("bytes"), bytes):
            return [Medium(kind=kind, data=given["bytes"], path=given.get("path"))]
        value = given.get("path") or given.get("url")
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"its media were {shown(value)}; they have to be bytes, a path or an address")
    if value.startswith(REMOTE):
        return [Medium(kind=kind or kind_of_name(value), url=value)]
    path = os.path.join(folder, os.path.expanduser(value))
    return [Medium(kind=kind or EXTENSIONS.get(os.path.splitext(path)[1].lower()), path=path)]


def kind_of(data: bytes) -> Kind:
    """Whether bytes are a picture or a clip, by how they begin."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return "image" if is_webp or data.startswith(SIGNATURES) else "video"


def kind_of_name(url: str) -> Kind:
    if url.startswith("data:video/"):
        return "video"
    return EXTENSIONS.get(os.path.splitext(url.partition("?")[0])[1].lower(), "image")


def _mime(data: bytes, kind: Kind) -> str:
    if kind == "video":
        return "video/webm" if data.startswith(b"\x1aE\xdf\xa3") else "video/mp4"
    known = {b"\x89PNG": "image/png", b"GIF8": "image/gif", b"BM": "image/bmp", b"RIFF": "image/webp"}
    return next((mime for mark, mime in known.items() if data.startswith(mark)), "image/jpeg")
