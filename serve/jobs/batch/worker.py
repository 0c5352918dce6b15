"""One worker process of a job: it holds an engine of its own and answers what its parent sends.

    python -P -c "from serve.jobs.batch.worker import main; main()" FD

FD is the worker's end of a pipe of `multiprocessing`. Its parent sends how the application is built, then requests.
The worker says `None` when it is ready, or the text of the error that keeps it from starting. It ends with the pipe,
so it never outlives its parent, and leaves Ctrl-C and SIGTERM to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from mm.errors import MmError

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI

END_S = 4.0
"""A worker without its parent ends after this time, even if it still computes."""
Build = Callable[[Any], AbstractAsyncContextManager["FastAPI"]]
"""Makes the application of a worker from its configuration."""


class Asked(NamedTuple):
    """A request, as the parent sends it."""

    number: int
    path: str
    content: bytes


class Answered(NamedTuple):
    """A response, as a worker sends it."""

    number: int
    status: int
    retry_after: str
    content: bytes


def main() -> None:
    """Work until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    asyncio.run(_work(pipe))
    os._exit(0)  # threads that still compute have nobody to tell


async def _work(pipe: Connection[Any, Any]) -> None:
    from serve.jobs.batch.asking import local_client

    build: Build
    build, config = pipe.recv()
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    arrived: asyncio.Queue[Asked] = asyncio.Queue()
    hand_over = functools.partial(loop.call_soon_threadsafe, arrived.put_nowait)
    end = functools.partial(loop.call_soon_threadsafe, gone.set)
    # From now on, so that a model is not loaded for a parent that is gone.
    threading.Thread(target=_read, args=(pipe, hand_over, end), daemon=True).start()
    try:
        async with build(config) as app, local_client(app) as client:
            _tell(pipe, None)
            answering = loop.create_task(_answer_all(pipe, arrived, client))
            ending = loop.create_task(gone.wait())
            await asyncio.wait((ending, answering), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():  # which only an error does; the parent sends again what is lost with this process
                answering.result()
    except MmError as error:
        _tell(pipe, str(error))


async def _answer_all(pipe: Connection[Any, Any], arrived: asyncio.Queue[Asked], client: httpx.AsyncClient) -> None:
    """Answer each request as it comes, all together; ends when it is cancelled."""

    async def answer(asked: Asked) -> None:
        headers = {"content-type": "application/json"}
        response = await client.post(asked.path, content=asked.content, headers=headers)
        after = response.headers.get("retry-after", "")
        _tell(pipe, Answered(asked.number, response.status_code, after, response.content))

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(answer(await arrived.get()))


def _tell(pipe: Connection[Any, Any], message: object) -> None:
    """Send a message; to a parent that is gone nothing has to be said."""
    with contextlib.suppress(OSError):
        pipe.send(message)


def _read(pipe: Connection[Any, Any], hand_over: Callable[[Asked], object], end: Callable[[], object]) -> None:
    """Hand requests over until the parent is gone; nothing that a worker holds has to outlive it."""
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            break
        hand_over(asked)
    end()
    time.sleep(END_S)
    os._exit(0)
