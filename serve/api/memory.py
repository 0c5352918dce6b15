"""Gives memory back to the system after a large request.

glibc keeps freed blocks below 32 MB for later. After a large body they can be as large as the body was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with another C library."""
    try:
        return cast("Callable[[int], int] | None", getattr(ctypes.CDLL(None), "malloc_trim", None))
    except OSError:
        return None


_TRIM = _malloc_trim()


def trim() -> None:
    """Give back what the process has freed. It takes milliseconds, in which other threads may run."""
    if _TRIM is not None:
        _TRIM(0)
