"""Files to which lines are appended, by processes that may be killed in the middle of one."""

from __future__ import annotations

import os
from pathlib import Path

CHUNK_BYTES = 64 * 1024


def cut_unfinished_line(path: Path) -> None:
    """Remove what stands after the last line break, if the file is there.

    A kill left it. It is no line, and the next one would be joined to it.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - CHUNK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
