"""Which files a job is about: inputs to items, in a stable order, each file once.

The extension alone decides whether a file is an image or a clip; whether it really is one shows when it is decoded. A
GIF counts as an image, of which the first frame is seen. Nothing here opens a file.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mm.data.media import Kind

EXTENSIONS: dict[str, Kind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".m2ts", ".mpg"), "video"),
    **dict.fromkeys((".mpeg", ".vob", ".flv", ".f4v", ".ogv", ".wmv", ".asf"), "video"),
}
"""`.ts` and `.mts` are left out: in most folders they are TypeScript."""


class Item(NamedTuple):
    """A file to caption.

    Attributes:
        path: What identifies it: the real path of its folder, and its own name. So a file reached twice, over
            `..` or through a linked folder, is one item, and a link to a file is an item of its own.
    """

    path: str
    kind: Kind


@dataclass(kw_only=True)
class Found:
    """What the inputs led to.

    Attributes:
        items: In the order of the inputs; within a folder by name, files before subfolders.
        skipped: Files that are no image or clip by their extension, counted by it.
        problems: Inputs that led nowhere and folders that could not be read, one sentence each.
    """

    items: list[Item] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def find_items(inputs: Sequence[str], patterns: Sequence[str] = (), exclude: str | None = None) -> Found:
    """The images and clips that `inputs` name.

    Hidden files and folders are left out unless an input names them. Linked folders are followed, each folder once.

    Args:
        patterns: Names to take from folders; empty takes all.
        exclude: A folder to leave out: the job's own output.
    """
    search = _Search(patterns, None if exclude is None else os.path.realpath(exclude))
    for text in inputs:
        search.add_input(os.path.expanduser(text))
    return search.found


class _Search:
    def __init__(self, patterns: Sequence[str], exclude: str | None) -> None:
        self.found = Found()
        self._patterns = patterns
        self._exclude = exclude
        self._seen_paths: set[str] = set()
        self._seen_folders: set[str] = set()

    def add_input(self, text: str) -> None:
        if os.path.lexists(text):
            self._add(text)
        elif not glob.has_magic(text):
            self.found.problems.append(f"{text} does not exist")
        elif matches := sorted(glob.glob(text, recursive=True)):
            for match in matches:
                self._add(match)
        else:
            self.found.problems.append(f"nothing matches {text}")

    def _add(self, path: str) -> None:
        if not os.path.isdir(path):
            self._add_file(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            return
        for folder, names in self._walk(path):
            for name in names:
                if not self._patterns or any(fnmatch.fnmatch(name, pattern) for pattern in self._patterns):
                    self._add_file(folder, name)

    def _add_file(self, folder: str, name: str) -> None:
        path = os.path.join(folder, name)
        if path in self._seen_paths:
            return
        self._seen_paths.add(path)
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            self.found.items.append(Item(path, EXTENSIONS[extension]))
        else:
            self.found.skipped[extension or "no extension"] += 1

    def _walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        """Each readable folder below `top` once, as its real path with its visible files."""
        for root, folders, names in os.walk(top, onerror=self._report, followlinks=True):
            folder = os.path.realpath(root)
            if folder in self._seen_folders or folder == self._exclude:
                folders.clear()
                continue
            self._seen_folders.add(folder)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield folder, sorted(name for name in names if not name.startswith("."))

    def _report(self, error: OSError) -> None:
        self.found.problems.append(f"the folder {error.filename} cannot be read: {error.strerror}")
