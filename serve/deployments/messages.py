"""What travels between the Ray deployments in place of encoded media. It knows neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm.data.media import Kind
from mm.data.outputs import Event

INLINE_BYTES = 1024 * 1024
"""Smaller media travel inside the message: a round trip to the object store costs more than copying them twice."""


@dataclass(frozen=True, kw_only=True)
class TransferredMedia:
    """Encoded media of a request, on their way from an encoder replica to a decoder replica.

    Attributes:
        reducer: Canonical text of the reducer.
        num_items: Media items of the request.
        num_cache_hits: Items that the encoder's cache held.
        media_bytes: Size of the encoded files, by kind.
        num_bytes: Size of all items together.
        seconds: That the encoders took for those that were not cached.
        keys: Hash of each item as it was sent; see `serve.deployments.affinity`.
        held: Name under which the replica that encoded them holds them, where the same replica generates.
        replica: Name of the replica that encoded them, where it is known.
        inline: The packed items that travel inside the message; see `serve.deployments.transport`.
        reference: Ray object references of the other packed items. They are inside a tuple, so that Ray passes them on
            and does not resolve them on the way.
        order: Place in the request of each item, those of `inline` first; empty where they are in order.
    """

    reducer: str
    num_items: int = 0
    num_cache_hits: int = 0
    media_bytes: Mapping[Kind, int] = field(default_factory=dict[Kind, int])
    num_bytes: int = 0
    seconds: float = 0.0
    keys: tuple[str, ...] = ()
    held: str = ""
    replica: str = ""
    inline: list[Any] | None = None
    reference: tuple[Any, ...] | None = None
    order: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Tensors of a prefill replica on their way to a decoder; see `serve.deployments.transport`.

    Attributes:
        transport: Its name.
        num_bytes: Size of the tensors.
        inline: The tensors, when they travel inside the message.
        reference: A tuple with the Ray object reference of the tensors otherwise.
    """

    transport: str
    num_bytes: int
    inline: Any = None
    reference: tuple[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A message of a prefill replica.

    Attributes:
        events: Of the first tokens; all of them, where the answer ends there.
        pieces: Keys and values, in order.
        state: What else a decoder needs. It comes last.
    """

    events: Sequence[Event] = ()
    pieces: Sequence[Carried] = ()
    state: Carried | None = None


@dataclass(frozen=True, kw_only=True)
class HandedKV:
    """All that a prefill replica computed of a request, for a decoder."""

    pieces: Sequence[Carried]
    state: Carried

    @property
    def has_references(self) -> bool:
        """Whether Ray has to count references in the message."""
        return any(one.reference is not None for one in (*self.pieces, self.state))
