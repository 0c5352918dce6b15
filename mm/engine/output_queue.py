"""The output queue of a request: events, and where another engine goes on also keys and values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from mm.data.outputs import Event
from mm.engine.kv_transfer.messages import HandOff, KVPiece

E = TypeVar("E")


class Queue(Generic[E]):
    """What comes of one request, written by the thread that runs the engine and read by one reader.

    Args:
        on_change: Called after each event and at the end, by the writer.
    """

    def __init__(self, on_change: Callable[[], None] | None = None) -> None:
        self._events: deque[E] = deque()
        self._error: BaseException | None = None
        self._on_change = on_change
        self.has_ended = False

    def put(self, event: E) -> None:
        self._events.append(event)
        if self._on_change is not None:
            self._on_change()

    def end(self, error: BaseException | None = None) -> None:
        self._error, self.has_ended = error, True
        if self._on_change is not None:
            self._on_change()

    @property
    def is_empty(self) -> bool:
        """Whether there is neither an event nor the end to be read."""
        return not self._events and not self.has_ended

    def take(self) -> list[E]:
        """Remove and return the events that are there."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def raise_error(self) -> None:
        """Raise the request's error if it failed, once.

        Its traceback will hold whoever calls this, and so this queue. If the queue held it, it would hold itself.
        """
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error


class OutputQueue(Queue[Event]):
    """The events of a request."""


class HandOffQueue(Queue["Event | KVPiece | HandOff"]):
    """The first events of a request, and what another engine needs to go on."""

    def put_piece(self, piece: KVPiece) -> None:
        self.put(piece)

    def hand_over(self, state: HandOff) -> None:
        self.put(state)
