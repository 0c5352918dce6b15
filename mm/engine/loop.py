"""The output queue of a request."""

from __future__ import annotations

import queue

from mm.data.outputs import Event


class OutputQueue:
    """A sink that a thread reads from."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[Event | None, BaseException | None]] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._items.put((event, None))

    def end(self, error: BaseException | None = None) -> None:
        self._items.put((None, error))

    def take(self) -> tuple[Event | None, BaseException | None] | None:
        """The next event, (None, error) at the end, or None when nothing is there yet."""
        try:
            return self._items.get_nowait()
        except queue.Empty:
            return None
