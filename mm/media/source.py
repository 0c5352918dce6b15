"""The encoded bytes of an item, from a path, a `data:` URL or an allowed http(s) address.

Sizes are checked before the bytes are read. Declared media types are ignored.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from mm.config import SourcePolicy
from mm.data.media import Kind, Media, MediaSource
from mm.errors import MediaError
from mm.media.data_url import is_data_url, read_data_url
from mm.media.limits import MediaBudget

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def is_remote(item: Media) -> bool:
    """Whether fetching the item is a download, which may take seconds."""
    source = item.source if isinstance(item, MediaSource) else None
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch(source: MediaSource, policy: SourcePolicy, budget: MediaBudget) -> bytes:
    """The item's encoded bytes. Draws one item and its bytes from the budget.

    Raises:
        MediaError: `bad_source`, `bad_data_url`, `file_not_found`, `remote_disabled`, `domain_not_allowed`,
            `fetch_failed`, `empty`, `too_many_bytes` or `too_many_items`; `param` is the source's.
    """
    try:
        budget.take_item(source.kind)
        data = _read(source, policy, budget)
        budget.take_bytes(source.kind, len(data))
    except MediaError as error:
        raise (error.at(source.param) if source.param else error) from None
    return data


def _read(item: MediaSource, policy: SourcePolicy, budget: MediaBudget) -> bytes:
    source = item.source
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return _read_path(source, item.kind, policy, budget)
    if not isinstance(source, str):
        raise MediaError("bad_source", item.kind)
    if is_data_url(source):
        return read_data_url(source, item.kind, budget)
    if is_remote(item):
        from mm.media.remote import download  # brings httpx, which most processes never need

        return download(source, item.kind, policy, budget)
    if SCHEME.match(source):
        raise MediaError("bad_source", item.kind)
    return _read_path(Path(source), item.kind, policy, budget)


def _read_path(path: Path, kind: Kind, policy: SourcePolicy, budget: MediaBudget) -> bytes:
    """The bytes of a regular file. Devices and pipes are refused, since reading them may never end."""
    if not policy.allow_paths:
        raise MediaError("bad_source", kind)
    try:
        # O_NONBLOCK: opening a pipe that has no writer would block.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MediaError("file_not_found", kind)
            budget.check_bytes(kind, status.st_size)
            return file.read(status.st_size)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        raise MediaError("file_not_found", kind) from None
