"""NumPy arrays to tensors, with types that torch's own signature lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


def to_tensor(array: NDArray[Any], device: torch.device | str | None = None) -> Tensor:
    """The array as a tensor of the same dtype. On the CPU both share memory; any other device gets a copy."""
    tensor: Tensor = torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
    return tensor if device is None else tensor.to(device)
