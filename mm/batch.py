"""Many requests together: media are encoded in one thread while earlier requests are decoded in another."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.engine.loop import EngineLoop, OutputQueue, Submitted
from mm.errors import MmError

T = TypeVar("T")

PATIENCE = 3.0
"""How many times the usual encoding time the engine of a job waits for the next request."""


class Gathering:
    """When a job steps its engine, and when it waits for more requests first.

    A step costs little more with many sequences than with few, and in a job nobody waits for a single token. So the
    engine waits for the encoder until its batch is full or nothing is being encoded. If the next request takes much
    longer than usual, as with a slow download, the engine goes on without it.

    Args:
        full: Requests of a full batch.
    """

    def __init__(self, full: int) -> None:
        self._full = full
        self._usual_s = 0.0
        self._waits_until = 0.0

    def timed(self, encode: Callable[[], T]) -> T:
        """Encode a request, and note how long it took."""
        start = time.monotonic()
        try:
            return encode()
        finally:
            end = time.monotonic()
            spent = end - start
            self._usual_s = 0.8 * self._usual_s + 0.2 * spent if self._usual_s else spent
            self._waits_until = end + PATIENCE * self._usual_s

    def wait_s(self, num_running: int) -> float | None:
        """Seconds that the engine waits for the next request before it steps. None means as long as it takes.

        Args:
            num_running: Requests in the engine.
        """
        if not num_running:
            return None
        return max(0.0, self._waits_until - time.monotonic()) if num_running < self._full else 0.0


def generate_batch(
    requests: Iterable[Request], encode: Callable[[Request], EncodedMedia], loop: EngineLoop, *, full: int = 16
) -> Iterator[tuple[int, list[Event] | MmError]]:
    """Each request's index in `requests` with all its events, or with its error, in order of completion.

    Args:
        encode: The encoder's half, called in a thread of its own.
        loop: Runs the engine. It must not have been started: the caller's thread runs the engine.
        full: Requests of a full batch. Twice as many are encoded or in the engine at a time, which bounds the memory of
            an endless iterable.
    """
    indexed, gathering = enumerate(requests), Gathering(full)
    encoding: dict[Future[EncodedMedia], tuple[int, Request]] = {}
    running: dict[int, Submitted] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        try:
            while True:
                room = 2 * full - len(encoding) - len(running)
                for index, request in itertools.islice(indexed, room):
                    encoding[pool.submit(gathering.timed, functools.partial(encode, request))] = index, request
                if not encoding and not running:
                    return
                wait_s = gathering.wait_s(len(running)) if encoding else 0.0
                is_stepping = wait_s == 0.0 or not wait(encoding, wait_s, FIRST_COMPLETED).done
                for future in [future for future in encoding if future.done()]:
                    index, request = encoding.pop(future)
                    try:
                        running[index] = loop.submit(request, future.result())
                    except MmError as error:
                        yield index, error
                if is_stepping:
                    loop.step()
                for index, submitted in list(running.items()):
                    if submitted.queue.has_ended:
                        del running[index]
                        yield index, _outcome(submitted.queue)
        finally:
            for future in encoding:
                future.cancel()
            for submitted in running.values():
                loop.abort(submitted)


def _outcome(queue: OutputQueue) -> list[Event] | MmError:
    """All events of a request that has ended, or its error.

    Raises:
        BaseException: An error that is not ours.
    """
    try:
        queue.raise_error()
    except MmError as error:
        return error
    return queue.take()
