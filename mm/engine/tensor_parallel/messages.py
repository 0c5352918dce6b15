"""What rank 0 tells the other members: an operation, its arguments, and what happened to the cache before it.

JSON with the arrays behind it: numbers and texts only, so a message can make no member run anything else.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm.data.arrays import to_tensor
from mm.models.attention import AttentionMetadata

ARRAY, MASKS = "array", "masks"
METADATA = ("seq_indices", "query_starts", "query_lens")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What all members do next.

    Attributes:
        name, arguments: Of the operation.
        cache_calls: Methods of the cache with their arguments, in order, that rank 0 called since the last operation.
    """

    name: str
    arguments: Mapping[str, Any]
    cache_calls: Sequence[tuple[str, Sequence[object]]] = ()


def encode(operation: Operation) -> bytes:
    """The operation as bytes."""
    arrays: list[NDArray[Any]] = []

    def plain(value: Any) -> object:
        if isinstance(value, np.ndarray | Tensor):
            array: NDArray[Any] = np.ascontiguousarray(value.cpu().numpy() if isinstance(value, Tensor) else value)  # pyright: ignore[reportUnknownArgumentType]
            arrays.append(array)
            return {ARRAY: [array.dtype.str, list(array.shape)]}
        if isinstance(value, np.integer):
            return int(cast(Any, value))
        if isinstance(value, AttentionMetadata):
            masks = [[[i, plain(mask)] for i, mask in one.items()] for one in (value.masks, value.windowed_masks)]
            fields: list[object] = [plain(getattr(value, name)) for name in METADATA]
            return {MASKS: [masks, fields]}
        if isinstance(value, list | tuple):
            return [plain(one) for one in cast("Sequence[object]", value)]
        return value

    calls = [[name, plain(list(given))] for name, given in operation.cache_calls]
    arguments = {name: plain(value) for name, value in operation.arguments.items()}
    text = json.dumps([operation.name, arguments, calls]).encode()
    # In the order in which `decode` meets them: it reads the text from the left to the right.
    return b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in arrays)])


def decode(body: bytes, device: torch.device) -> Operation:
    """The operation of `encode`. Masks become tensors on a device, all other arrays NumPy's."""
    (length,) = struct.unpack_from("<I", body)
    read: tuple[str, dict[str, Any], list[list[Any]]] = json.loads(body[4 : 4 + length])
    name, arguments, calls = read
    at = 4 + length

    def full(value: Any) -> Any:
        nonlocal at
        if isinstance(value, list):
            return [full(one) for one in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        fields = cast("dict[str, Any]", value)
        if MASKS in fields:
            masks: list[list[list[Any]]] = fields[MASKS][0]
            plain, windowed = ({int(i): to_tensor(full(mask), device) for i, mask in one} for one in masks)
            arrays = dict(zip(METADATA, full(fields[MASKS][1]), strict=True))
            return AttentionMetadata(**arrays, masks=plain, windowed_masks=windowed)
        kind, shape = cast("tuple[str, list[int]]", fields[ARRAY])
        array = np.frombuffer(body, np.dtype(kind), math.prod(shape), at).reshape(shape).copy()
        at += array.nbytes
        return array

    cache_calls = [(method, full(given)) for method, given in calls]
    found = {key: full(value) for key, value in arguments.items()}
    return Operation(name=name, arguments=found, cache_calls=cache_calls)
