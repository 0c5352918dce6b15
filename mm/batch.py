"""Many requests together: media are encoded in one thread while earlier requests are decoded in another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mm.data.outputs import Event
from mm.data.request import Request
from mm.data.tokens import EncodedMedia
from mm.engine.loop import EngineLoop, OutputQueue, Submitted
from mm.errors import MmError


def generate_batch(
    requests: Iterable[Request], encode: Callable[[Request], EncodedMedia], loop: EngineLoop, *, ahead: int = 32
) -> Iterator[tuple[int, list[Event] | MmError]]:
    """Each request's index in `requests` with all its events, or with its error, in order of completion.

    Args:
        encode: The encoder's half, called in a thread of its own.
        loop: Runs the engine. It must not have been started: the caller's thread runs the engine.
        ahead: Requests that are encoded or in the engine at a time. It bounds the memory of an endless iterable.
    """
    indexed = enumerate(requests)
    encoding: dict[Future[EncodedMedia], tuple[int, Request]] = {}
    running: dict[int, Submitted] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        try:
            while True:
                room = ahead - len(encoding) - len(running)
                for index, request in itertools.islice(indexed, room):
                    encoding[pool.submit(encode, request)] = index, request
                if not encoding and not running:
                    return
                if not running:
                    wait(encoding, return_when=FIRST_COMPLETED)
                for future in [future for future in encoding if future.done()]:
                    index, request = encoding.pop(future)
                    try:
                        running[index] = loop.submit(request, future.result())
                    except MmError as error:
                        yield index, error
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
