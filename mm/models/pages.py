"""Gives the pages of weights back that were read from a mapped file and are held in another form now.

safetensors maps a file, and the mapping lasts as long as any tensor of it. So the last small norm would keep all
weights of the file resident that were joined, packed, converted or quantised long ago.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import cast

from torch import Tensor

MADV_PAGEOUT = 21
"""Reclaims pages. Those of a file are read again if they are used again, and no others are lost either."""


def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return cast("Callable[..., int]", ctypes.CDLL(None, use_errno=True).madvise)
    except (OSError, AttributeError):
        return None


_MADVISE = _madvise()


def release_pages(tensor: Tensor) -> None:
    """Give back the whole pages of a tensor on the CPU whose values are held elsewhere now. It stays readable."""
    if _MADVISE is None or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:  # a kernel older than 5.4 refuses, which costs memory only
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(MADV_PAGEOUT))
