"""Worker processes of this machine, as a transport of HTTP: each request goes to the worker with the fewest.

A worker that dies is replaced, and its requests are sent again. Any of them may be what killed it, so each is sent
alone to a worker that holds nothing else. A request that kills that one too fails for good; the others are innocent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import httpx

from serve.jobs.batch.asking import AskError
from serve.jobs.batch.worker import Answered, Asked, Build
from serve.jobs.job import JobError

MAX_DEATHS = 2
"""A request during which so many workers died is not sent again."""
MAX_BAD_STARTS = 3
"""So many workers may die while they start or have nothing to do, without an answer between; then the job ends."""
KILL_S = 6.0
STDERR = 2
"""What a worker prints goes there, as stdout may hold the counts of the job."""
PROGRAM = "from serve.jobs.batch.worker import main; main()"


class _Died(Exception):
    """The worker of a request has died."""


@dataclass(eq=False, kw_only=True)
class _Worker:
    """One process, and the requests that it has."""

    index: int
    process: subprocess.Popen[bytes]
    pipe: Connection[Any, Any]
    is_ready: bool = False
    in_flight: dict[int, asyncio.Future[Answered]] = field(default_factory=dict[int, "asyncio.Future[Answered]"])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: object) -> None:
        """Blocks while the pipe is full. A dead worker gets nothing; that it died is seen by who reads from it."""
        with self.lock, contextlib.suppress(OSError):
            self.pipe.send(message)


class Workers(httpx.AsyncBaseTransport):
    """The workers of a job.

    Args:
        build: Makes the application in each worker; found there by its name.
        configs: What each worker is built from.
        places: Requests of one worker at a time at most.
        say: Told what the user should know: that a worker died.
    """

    def __init__(self, build: Build, configs: Sequence[object], places: int, say: Callable[[str], None]) -> None:
        self._build, self._configs, self._places, self._say = build, configs, places, say
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._numbers = itertools.count()
        self._quarantine: _Worker | None = None
        self._num_suspects = self._num_bad_starts = 0
        self._failure: JobError | None = None
        self._is_closing = False
        self._workers = [self._start(i) for i in range(len(configs))]

    @property
    def pids(self) -> list[int]:
        """The process of each worker."""
        return [worker.process.pid for worker in self._workers]

    def _start(self, index: int) -> _Worker:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL, stdout=STDERR
        )
        theirs.close()  # so that the pipe ends with the worker
        worker = _Worker(index=index, process=process, pipe=ours)
        threading.Thread(target=self._read, args=(worker,), name=f"worker-{index}", daemon=True).start()
        return worker

    def _read(self, worker: _Worker) -> None:
        """Hand a worker's messages to the event loop until it is gone. Runs in a thread of its own."""
        worker.send((self._build, self._configs[worker.index]))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            while True:
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    break
                self._loop.call_soon_threadsafe(self._got, worker, message)
            code = worker.process.wait()
            self._loop.call_soon_threadsafe(self._ended, worker, code)

    def _got(self, worker: _Worker, message: object) -> None:
        if isinstance(message, Answered):
            self._num_bad_starts = 0
            future = worker.in_flight.pop(message.number, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif message is None:
            worker.is_ready = True
        else:
            self._failure = self._failure or JobError(str(message))
        self._wake()

    def _ended(self, worker: _Worker, code: int) -> None:
        if self._is_closing:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if not (worker.is_ready and worker.in_flight):
            self._num_bad_starts += 1
        if self._num_bad_starts >= MAX_BAD_STARTS and self._failure is None:
            self._failure = JobError(
                f"workers do not live: {MAX_BAD_STARTS} of them ended without having a request, the last one {how}"
            )
        if self._failure is None:
            rows = f"; its {len(worker.in_flight)} requests are sent again" if worker.in_flight else ""
            self._say(f"worker {worker.index} {how}{rows}")
            self._workers[worker.index] = self._start(worker.index)
        if self._quarantine is worker:
            self._quarantine = None
        worker.pipe.close()
        for future in worker.in_flight.values():
            if not future.done():
                future.set_exception(_Died(how))
        worker.in_flight.clear()
        self._wake()

    def _wake(self) -> None:
        """Let all who wait look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so.

        Raises:
            JobError: No worker can start.
        """
        while self._failure is None and not is_so():
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    async def ready(self) -> None:
        """Wait for the first worker that can answer.

        Raises:
            JobError: None can.
        """
        await self._until(lambda: any(worker.is_ready for worker in self._workers))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer a request by one of the workers.

        Raises:
            AskError: It killed workers.
            JobError: No worker can start.
        """
        content = await request.aread()
        try:
            answered = await self._ask(request.url.path, content, alone=False)
        except _Died:
            answered = await self._ask_again(request.url.path, content)
        headers = {"content-type": "application/json"}
        if answered.retry_after:
            headers["retry-after"] = answered.retry_after
        return httpx.Response(answered.status, headers=headers, content=answered.content, request=request)

    async def _ask_again(self, path: str, content: bytes) -> Answered:
        """Send a request alone, as a worker died that had it."""
        self._num_suspects += 1
        try:
            return await self._ask(path, content, alone=True)
        except _Died as died:
            what = f"{MAX_DEATHS} workers died while they answered it, the last one when it had nothing else: it {died}"
            raise AskError("answer", "worker_died", what, is_fault=False, attempts=MAX_DEATHS) from None
        finally:
            self._num_suspects -= 1
            if not self._num_suspects:
                self._quarantine = None
            self._wake()

    async def _ask(self, path: str, content: bytes, *, alone: bool) -> Answered:
        number, future = next(self._numbers), self._loop.create_future()
        await self._until(lambda: self._place(number, future, alone))
        worker = next(worker for worker in self._workers if number in worker.in_flight)
        try:
            await asyncio.to_thread(worker.send, Asked(number, path, content))
            return await future
        finally:
            worker.in_flight.pop(number, None)

    def _place(self, number: int, future: asyncio.Future[Answered], alone: bool) -> bool:
        """Give a request to a worker, if one has room for it."""
        ready = [worker for worker in self._workers if worker.is_ready]
        if alone and self._quarantine is None and ready:
            self._quarantine = min(ready, key=lambda worker: len(worker.in_flight))
        if alone:
            fit = [self._quarantine] if self._quarantine and not self._quarantine.in_flight else []
        else:
            fit = [one for one in ready if one is not self._quarantine and len(one.in_flight) < self._places]
        if fit:
            min(fit, key=lambda worker: len(worker.in_flight)).in_flight[number] = future
        return bool(fit)

    async def aclose(self) -> None:
        """End the workers; what they still compute is lost."""
        self._is_closing = True
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        for worker in self._workers:
            # Closing the pipe would not end it, as a thread reads from it.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(worker.pipe.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
        for worker in self._workers:
            try:
                worker.process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
