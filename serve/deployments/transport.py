"""Visual tokens as they travel between replicas: NumPy arrays, which Ray moves through shared memory without copying.

torch tensors would be pickled through a byte string, and NumPy has no bfloat16; so bits travel as integers beside the
name of their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError

from mm.data.tokens import Encoded, EncodedMedia
from serve.deployments.messages import TransferredMedia
from serve.runtime import MediaLost

PLANES = ("embeddings", "positions", "sizes", "protected", "layer_planes")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Packed = tuple[np.ndarray, str]
"""Bits as integers, and the name of the dtype they stand for."""


def pack_tensor(tensor: torch.Tensor) -> Packed:
    bits = tensor.detach().contiguous().cpu().view(BITS[tensor.element_size()])
    return bits.numpy(), str(tensor.dtype).removeprefix("torch.")


def unpack_tensor(packed: Packed) -> torch.Tensor:
    """A tensor of its own: the array lies in shared memory that is read-only and may be given back at any time."""
    bits, dtype = packed
    return torch.from_numpy(bits.copy()).view(getattr(torch, dtype))


def pack(encoded: Sequence[Encoded]) -> list[tuple[Encoded, dict[str, Packed]]]:
    """Items with their tensors set apart. Auxiliary features are left out: only the reducer reads them."""
    packed = []
    for item in encoded:
        names = [name for name in PLANES if getattr(item.tokens, name) is not None]
        planes = {name: pack_tensor(getattr(item.tokens, name)) for name in names}
        tokens = replace(item.tokens, **dict.fromkeys(names, torch.empty(0)), aux_features={})
        packed.append((replace(item, tokens=tokens), planes))
    return packed


def unpack(packed: Sequence[tuple[Encoded, Mapping[str, Packed]]]) -> list[Encoded]:
    return [
        replace(item, tokens=replace(item.tokens, **{name: unpack_tensor(plane) for name, plane in planes.items()}))
        for item, planes in packed
    ]


def num_bytes(packed: Sequence[tuple[Encoded, Mapping[str, Packed]]]) -> int:
    return sum(bits.nbytes for _, planes in packed for bits, _ in planes.values())


async def receive(media: TransferredMedia) -> EncodedMedia:
    """The encoded media, fetched from wherever they are.

    Raises:
        MediaLost: The replica that held them is gone.
    """
    if media.reference is None:
        return EncodedMedia(items=tuple(unpack(media.inline or [])), reducer=media.reducer)
    try:
        items = await media.reference[0]
    except (ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError, GetTimeoutError) as error:
        raise MediaLost("the encoded media are gone; encode them again") from error
    return EncodedMedia(items=tuple(unpack(items)), reducer=media.reducer)
