"""A hash that names an encoder by its content, for cache keys."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from blake3 import blake3
from torch import Tensor

from mm.media.hashing import framed_hash


def fingerprint(*parts: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of `parts` and of the weights' names, shapes, dtypes and bytes.

    It reads the bytes, and not the file's size and time. So replicas on several hosts agree, and a checkpoint that is
    overwritten by further training gets another hash. It takes about half a second per gigabyte of tower, once.
    """
    digest = blake3()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(framed_hash(name, str(tensor.dtype), str(tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return framed_hash("encoder", *parts, digest.hexdigest())
