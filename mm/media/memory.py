"""The memory that decoded pixels of all requests of a process may take at a time."""

from __future__ import annotations

import threading
from collections import deque

from mm.errors import CapacityError

WAIT_S = 30.0
"""Longest wait for other requests to give memory back."""


class DecodeMemory:
    """Lends bytes for decoded pixels. Who finds too little left waits, in the order of asking. Thread-safe.

    It counts sizes that are known before decoding; it allocates nothing. `MediaBudget` borrows for a request.

    Args:
        limit_bytes: Bytes that are lent at a time.
        wait_s: Seconds after which waiting ends in an error.
    """

    def __init__(self, limit_bytes: int, wait_s: float = WAIT_S) -> None:
        self.limit_bytes, self._wait_s = limit_bytes, wait_s
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._num_bytes = 0
        self._num_held_by_waiting = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are lent now."""
        return self._num_bytes

    @property
    def num_waiting(self) -> int:
        """Who waits now."""
        return len(self._waiting)

    def take(self, num_bytes: int, held_bytes: int = 0) -> None:
        """Borrow; wait until there is enough.

        Args:
            num_bytes: At most `limit_bytes` together with `held_bytes`.
            held_bytes: What the same request holds already. It goes before those that hold nothing, which may wait for
                what it holds.

        Raises:
            CapacityError: Others gave too little back in time, or all that is lent is held by those who wait.
        """
        ticket = object()
        with self._changed:
            if held_bytes:
                self._waiting.appendleft(ticket)
            else:
                self._waiting.append(ticket)
            self._num_held_by_waiting += held_bytes
            try:
                if not self._changed.wait_for(lambda: self._is_next(ticket, num_bytes), self._wait_s):
                    raise CapacityError("the memory for decoded media is in use by other requests; try again later")
                if self._num_bytes + num_bytes > self.limit_bytes:
                    raise CapacityError("the requests that wait hold all memory for decoded media; try again later")
                self._num_bytes += num_bytes
            finally:
                self._waiting.remove(ticket)
                self._num_held_by_waiting -= held_bytes
                self._changed.notify_all()

    def _is_next(self, ticket: object, num_bytes: int) -> bool:
        """Whether waiting is over: it is this one's turn and there is enough, or there will never be."""
        if self._waiting[0] is not ticket:
            return False
        is_stuck = 0 < self._num_bytes == self._num_held_by_waiting
        return self._num_bytes + num_bytes <= self.limit_bytes or is_stuck

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._num_bytes -= num_bytes
            self._changed.notify_all()
