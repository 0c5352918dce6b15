"""How many requests are in flight, and whether one more may come in."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from mm.errors import CapacityError
from serve.api.metrics import Metrics

log = logging.getLogger(__name__)

SAY_S = 1.0
"""Between two lines of the log about requests that connections refuse."""
LIMITED_PATHS = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/chat/completions/count",
        b"/v1/completions",
        b"/v1/responses",
        b"/v1/embeddings",
        b"/tokenize",
        b"/detokenize",
    }
)
"""What is refused while there is no room; everything else is answered always."""


class Room:
    """The requests in flight at one ingress.

    Args:
        most: As many may be in flight.
        name: Of the model, for the metrics.
    """

    def __init__(self, most: int, metrics: Metrics, name: str) -> None:
        self._most, self.num_in_flight = most, 0
        self._in_flight, self._rejections = metrics.in_flight.labels(name), metrics.rejections.labels(name)
        self._num_refused, self._said = 0, 0.0

    @property
    def is_full(self) -> bool:
        return self.num_in_flight >= self._most

    def check(self) -> None:
        """Refuse a request for which there is no room.

        Raises:
            CapacityError: Too many requests are in flight.
        """
        if self.is_full:
            self._rejections.inc()
            raise busy()

    def take(self) -> Place:
        """A place for one request.

        Raises:
            CapacityError: Too many requests are in flight.
        """
        self.check()
        self.num_in_flight += 1
        self._in_flight.inc()
        return Place(self)

    def give_back(self) -> None:
        """End what `take` began. `Place` calls it."""
        self.num_in_flight -= 1
        self._in_flight.dec()

    def count_refused(self) -> None:
        """Count a request that its connection refused. The log has one line a second for all of them."""
        self._rejections.inc()
        self._num_refused += 1
        if (now := time.monotonic()) - self._said >= SAY_S:
            log.info("refused %d requests with 429: %d are in flight", self._num_refused, self.num_in_flight)
            self._num_refused, self._said = 0, now


class Place:
    """What a request has while it is in flight.

    A connection may take it for a request that is there as a whole; else many that arrive together would all see the
    same room. Then whoever answers the request uses it. Until then the connection gives it back with the answer.
    """

    def __init__(self, room: Room) -> None:
        self._room: Room | None = room
        self._is_used = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep the place until the context ends, whatever becomes of the connection."""
        self._is_used = True
        try:
            yield
        finally:
            self._leave()

    def leave_unused(self) -> None:
        """Give it back if nobody used it."""
        if not self._is_used:
            self._leave()

    def _leave(self) -> None:
        if self._room is not None:
            self._room.give_back()
            self._room = None


def busy() -> CapacityError:
    """What a client is told that is refused for want of room."""
    return CapacityError("the server is busy; try again shortly")
