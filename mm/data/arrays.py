"""Conversions between arrays, tensors and lists, with the types that torch's own signatures lack."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating[Any]]


def to_tensor(array: NDArray[Any], device: torch.device | str | None = None) -> Tensor:
    """The array as a tensor of the same dtype. On the CPU both share memory; any other device gets a copy."""
    tensor: Tensor = torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
    return tensor if device is None else tensor.to(device)


def ints(tensor: Tensor) -> list[int]:
    """The numbers of a vector (n,) of integers."""
    return cast("list[int]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def int_rows(tensor: Tensor) -> list[list[int]]:
    """The numbers of a matrix (n, m) of integers, row by row."""
    return cast("list[list[int]]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def float_rows(tensor: Tensor) -> list[list[float]]:
    """The numbers of a matrix (n, m) of floats, row by row."""
    return cast("list[list[float]]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def floats(tensor: Tensor) -> list[float]:
    """The numbers of a vector (n,) of floats."""
    return cast("list[float]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]
