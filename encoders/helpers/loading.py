"""Modules of a checkpoint, read by themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mm.models.checkpoint import check_tensors, fill_buffers, load_module, read_tensors
from mm.models.folder import reading

Rename = Callable[[str], str | None]
"""A key of the checkpoint to the module's own name, or None for tensors of other modules."""


def load_part(
    folder: Path,
    build: Callable[[], nn.Module],
    names: Callable[[nn.Module], Rename],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A module with its weights from a checkpoint, ready for inference. No other tensors are read.

    Args:
        build: Builds the module; called where tensors have no memory.
        names: Which keys of the checkpoint are tensors of the module.

    Raises:
        BadCheckpoint: A weight is missing, left over, or of another shape.
    """
    with torch.device("meta"), reading(folder, "config.json"):
        module = build()
    tensors = read_tensors(folder, names(module))
    check_tensors(module, tensors, folder)  # before buffers of the sizes in config.json get memory
    with reading(folder, "config.json"):
        fill_buffers(module, device)
    load_module(module, tensors, dtype=dtype, device=str(device), folder=folder)
    return module.eval()


def by_first_group(key: re.Pattern[str]) -> Rename:
    """Keys that `key` matches, renamed to its first group."""
    return lambda name: match[1] if (match := key.match(name)) else None
