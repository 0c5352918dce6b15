"""Tensors as they travel between replicas: NumPy arrays, which Ray moves through shared memory without copying.

torch tensors would be pickled through a byte string, and NumPy has no bfloat16; so bits travel as integers beside the
name of their dtype.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError

from mm.data.tokens import Encoded, EncodedMedia
from mm.engine.kv_transfer.messages import HandOff, KVPiece, ReceivedKV
from serve.config import KVTransport
from serve.deployments.messages import INLINE_BYTES, Carried, HandedKV, TransferredMedia
from serve.runtime import KVLost, MediaLost

PLANES = ("embeddings", "positions", "sizes", "protected", "layer_planes")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LOST = (ObjectLostError, OwnerDiedError, ReferenceCountingAssertionError, GetTimeoutError)
"""Errors of Ray that mean that an object is gone, with the process that made it."""

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
    try:
        fetched = await asyncio.gather(*(media.reference or ()))
    except LOST as error:
        raise MediaLost("the encoded media are gone; encode them again") from error
    items = unpack([item for some in (media.inline or [], *fetched) for item in some])
    if media.order:
        items = [item for _, item in sorted(zip(media.order, items, strict=True), key=lambda pair: pair[0])]
    return EncodedMedia(items=tuple(items), reducer=media.reducer)


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in the place of which it travels."""

    packed: Packed


def with_leaves(value: Any, kind: type, change: Callable[[Any], object]) -> Any:
    """The same plain data with every object of `kind` in it changed. It knows dataclasses, tuples, lists and dicts."""
    if isinstance(value, kind):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: with_leaves(getattr(value, one.name), kind, change) for one in dataclasses.fields(value)}
        return replace(value, **fields)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_leaves(one, kind, change) for one in value))
    if isinstance(value, tuple | list):
        return type(value)(with_leaves(one, kind, change) for one in value)
    if isinstance(value, dict):
        return {key: with_leaves(one, kind, change) for key, one in value.items()}
    return value


class Transport(Protocol):
    """How keys, values and states get from a prefill replica to a decoder.

    Attributes:
        names: The transports that a message may name, for the operator.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def send(self, arrays: Any, num_bytes: int) -> Carried:
        """Begin to move plain data with arrays in it. May take as long as copying it."""
        ...


class Inline:
    """Inside the message, by way of the ingress."""

    names = ("inline",)

    def send(self, arrays: Any, num_bytes: int) -> Carried:
        return Carried(transport="inline", num_bytes=num_bytes, inline=arrays)


class ObjectStore:
    """Through Ray's object store: shared memory on one node, from store to store between two."""

    names = ("object_store",)

    def send(self, arrays: Any, num_bytes: int) -> Carried:
        return Carried(transport="object_store", num_bytes=num_bytes, reference=(ray.put(arrays),))


class Auto:
    """What is small inside the message, and the rest through the object store."""

    names = ("inline", "object_store")

    def send(self, arrays: Any, num_bytes: int) -> Carried:
        return (Inline() if num_bytes < INLINE_BYTES else ObjectStore()).send(arrays, num_bytes)


TRANSPORTS: dict[KVTransport, Transport] = {"auto": Auto(), "inline": Inline(), "object_store": ObjectStore()}


async def sent(value: KVPiece | HandOff, transport: Transport) -> Carried:
    """Keys and values, or what else a decoder needs, on their way. Copying is done beside the event loop."""

    def send() -> Carried:
        arrays = with_leaves(value, torch.Tensor, lambda tensor: PackedTensor(pack_tensor(tensor)))
        return transport.send(arrays, value.num_bytes)

    return await asyncio.to_thread(send) if value.num_bytes >= INLINE_BYTES else send()


async def fetched(carried: Carried) -> Any:
    """What was sent, from wherever it is. Raises an error of Ray where it is gone."""
    arrays = carried.inline if carried.reference is None else await carried.reference[0]
    return with_leaves(arrays, PackedTensor, lambda one: unpack_tensor(one.packed))


async def received(handed: HandedKV, media: EncodedMedia) -> ReceivedKV:
    """What a prefill replica computed, fetched from wherever it is.

    Raises:
        KVLost: The replica is gone, and with it what it computed.
    """

    try:
        *pieces, state = await asyncio.gather(*map(fetched, (*handed.pieces, handed.state)))
    except LOST as error:
        raise KVLost("what a prefill replica had computed is gone; it is computed again") from error
    return ReceivedKV(media=media, pieces=pieces, state=state)
