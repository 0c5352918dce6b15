"""Progress of what runs before the first event of a response."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from mm.encode.clip_stream import ClipProgress, OnProgress

T = TypeVar("T")


async def with_progress(work: Callable[[OnProgress], Awaitable[T]]) -> AsyncGenerator[ClipProgress | T]:
    """What `work` tells while it runs, the newest only, and then its result. Closing the generator cancels it.

    Args:
        work: Is given a function that may be called from any thread.
    """
    loop, changed, reported = asyncio.get_running_loop(), asyncio.Event(), list[ClipProgress]()

    def tell(progress: ClipProgress) -> None:
        reported[:] = [progress]
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody reads any more
            loop.call_soon_threadsafe(changed.set)

    task = asyncio.ensure_future(work(tell))
    task.add_done_callback(lambda _: changed.set())
    try:
        while not task.done():
            await changed.wait()
            changed.clear()
            if reported and not task.done():
                yield reported.pop()
        yield task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task  # else its error would hold itself, through the traceback, and the request with it


def comment(progress: ClipProgress) -> bytes:
    """A line of the stream that is no event: clients that do not look for it skip it."""
    return f": encoded {progress.num_frames} of {progress.total_frames} frames\n\n".encode()
