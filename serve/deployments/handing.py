"""Prefill replicas as the ingress sees them, and a request that one of them has begun."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator

from mm.data.outputs import Event
from serve.config import KVTransport
from serve.deployments.messages import Carried, HandedKV, Prefilled
from serve.deployments.transport import TRANSPORTS
from serve.runtime import TransferStats


class Begun:
    """A request that a prefill replica computes, for a decoder.

    Args:
        messages: Of the replica. Closing them lets it free what it holds.
    """

    def __init__(self, messages: AsyncGenerator[Prefilled]) -> None:
        self._messages = messages
        self._pieces: list[Carried] = []
        self._state: Carried | None = None
        self._has_ended = False

    async def first(self) -> list[Event]:
        """The events of the first tokens."""
        async for message in self._messages:
            self._keep(message)
            if message.events:
                return list(message.events)
        self._has_ended = True
        return []

    async def rest(self) -> AsyncGenerator[list[Event]]:
        """More events, until the replica has handed everything over, or the answer has ended."""
        while self._state is None and not self._has_ended:
            message = await anext(self._messages, None)
            if message is None:
                self._has_ended = True
            else:
                self._keep(message)
                if message.events:
                    yield list(message.events)

    def _keep(self, message: Prefilled) -> None:
        self._pieces += message.pieces
        self._state = message.state or self._state

    @property
    def handed(self) -> HandedKV | None:
        """What a decoder needs; None where the answer ends without one."""
        return None if self._state is None else HandedKV(pieces=tuple(self._pieces), state=self._state)

    async def release(self) -> None:
        """Let the replica free what it holds. May be called again."""
        await self._messages.aclose()


class Gate:
    """How many requests the prefill stage has that have no token yet. While it is full, no more media are encoded.

    Args:
        width: Requests from which on it counts as full.
    """

    def __init__(self, width: int) -> None:
        self._width, self._num_inside = width, 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    @property
    def is_full(self) -> bool:
        return self._num_inside >= self._width

    @contextlib.contextmanager
    def passing(self) -> Generator[None]:
        """Count a request while it waits for its first token. It is never held back itself: its media are encoded."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._num_inside += change
        if self.is_full:
            self._has_room.clear()
        else:
            self._has_room.set()

    async def wait_for_room(self) -> None:
        """Return once a request more may be encoded."""
        await self._has_room.wait()


class Transfers:
    """What moved from prefill to decode."""

    def __init__(self, transport: KVTransport) -> None:
        self.stats = {name: TransferStats() for name in TRANSPORTS[transport].names}
        self.uses_references = transport != "inline"

    def count(self, handed: HandedKV) -> None:
        """Count what was handed over of one request."""
        every = (*handed.pieces, handed.state)
        for name in {one.transport for one in every}:
            stats = self.stats.setdefault(name, TransferStats())
            stats.num_requests += 1
            stats.num_bytes += sum(one.num_bytes for one in every if one.transport == name)
