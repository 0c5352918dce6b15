"""Gives memory back to the system after a large request.

glibc keeps freed blocks for later, up to 32 MB large once one of that size was freed. After a large body they can be as
large as the body was. So the largest blocks are mapped one by one, which are given back as they are freed, and what is
left of the others is given back after the request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

MAPPED_BYTES = 16 * 1024 * 1024
"""Blocks from this size on are mapped. What a model computes in one step on a CPU is mostly smaller."""
M_MMAP_THRESHOLD = -3


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None with another C library."""
    try:
        return cast("Callable[..., int] | None", getattr(ctypes.CDLL(None), name, None))
    except OSError:
        return None


_TRIM, _MALLOPT = _of_glibc("malloc_trim"), _of_glibc("mallopt")


def map_large_blocks() -> None:
    """Let this process give large blocks back as soon as they are freed. Called where bodies are read."""
    if _MALLOPT is not None:
        _MALLOPT(M_MMAP_THRESHOLD, MAPPED_BYTES)


def trim() -> None:
    """Give back what the process has freed. It takes milliseconds, in which other threads may run."""
    if _TRIM is not None:
        _TRIM(0)
