"""The flow of a job's work: a thread that loads ahead, and stopping on a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(
    items: Iterable[T],
    work: Callable[[T], R],
    num_ahead: int,
    prepare_thread: Callable[[], None] | None = None,
    meanwhile: Callable[[], bool] = lambda: False,
    patience_s: Callable[[], float | None] = lambda: 0.0,
) -> Generator[R]:
    """`work(item)` for each item in order, computed in one other thread.

    At most `num_ahead` results wait beyond the one handed out, however many items there are. Closing the iterator drops
    the results that wait and returns when the item in work is done.

    Args:
        meanwhile: Called repeatedly until the next result is there, or until it returns False.
        patience_s: How long to wait for the next result before each of these calls; None is as long as it takes.
    """

    def taken() -> R:
        first = waiting.popleft()
        while not wait([first], patience_s()).done and meanwhile():
            pass
        return first.result()

    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=prepare_thread)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num_ahead:
                yield taken()
        while waiting:
            yield taken()
    finally:
        pool.shutdown(cancel_futures=True)


class Stop:
    """Whether the job was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a true `Stop`, the second into KeyboardInterrupt.

    Outside the main thread, where Python takes no signals, the `Stop` stays false.
    """
    stop = Stop()

    def ask(number: int, _frame: object) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.signal = number
        # Not through a stream, since the signal may have interrupted a write to it.
        os.write(2, b"\nfinishing what was begun; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
