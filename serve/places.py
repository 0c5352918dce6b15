"""The places of an engine: requests wait for one before their media are encoded, in order of priority and arrival."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


class Places:
    """So many sequences may be with the engine, running or waiting. Used on one event loop.

    Without them an engine that is full would refuse requests that have been encoded already.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places, self._num_free = num_places, num_places
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @contextlib.asynccontextmanager
    async def taken(self, num_sequences: int, priority: int) -> AsyncIterator[None]:
        """Hold places for a request until the context ends; waits until there are as many.

        Args:
            num_sequences: More than there are places at all take all of them.
            priority: Lower is served first.
        """
        wanted = min(num_sequences, self._num_places)
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._arrivals), wanted, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(wanted)
            turn.cancel()
            self._serve()  # it may have been the first, for which the others waited
            raise
        try:
            yield
        finally:
            self._give_back(wanted)

    def _give_back(self, count: int) -> None:
        self._num_free += count
        self._serve()

    def _serve(self) -> None:
        """Give places to whoever is first, as long as there are enough. Nobody is overtaken."""
        while self._waiting:
            _, _, wanted, turn = self._waiting[0]
            if not turn.done():
                if wanted > self._num_free:
                    return
                self._num_free -= wanted
                turn.set_result(None)
            heapq.heappop(self._waiting)
