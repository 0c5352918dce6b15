"""Simulated time: the event loop, GPUs that computations share, and queues in front of them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ROUNDING = 1e-12


class Loop:
    """Calls functions in the order of their times; those of the same time in the order in which they were given."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., None], Any]] = []
        self._count = 0

    def at(self, time: float, call: Callable[[T], None], argument: T) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, call, argument))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now, _, call, argument = pop(heap)
            self.num_events += 1
            call(argument)


class Job:
    """A computation on a device.

    Attributes:
        work: Seconds that it takes alone.
        left: What of them is not done.
    """

    __slots__ = ("argument", "done", "left", "work")

    def __init__(self, work: float, done: Callable[[T], None], argument: T) -> None:
        self.work = self.left = work
        self.done, self.argument = done, argument


class Device:
    """A GPU, or the processor of an ingress: computations that run at the same time share it evenly.

    Args:
        lanes: How many of them run at full speed.

    Attributes:
        busy_s: Device seconds that were spent, at most `lanes` per second.
        work_s: Work of the computations that have ended. When nothing is left the two are equal.
    """

    __slots__ = ("_jobs", "_last", "_loop", "_next", "_version", "busy_s", "lanes", "work_s")

    def __init__(self, loop: Loop, lanes: float = 1.0) -> None:
        self._loop, self.lanes = loop, lanes
        self._jobs: list[Job] = []
        self._last, self._version = 0.0, 0
        self._next: Job | None = None
        self.busy_s = self.work_s = 0.0

    def start(self, work: float, done: Callable[[T], None], argument: T) -> Job:
        """Begin a computation; `done` is called with `argument` at its end."""
        self._advance()
        job = Job(work, done, argument)
        self._jobs.append(job)
        self._plan()
        return job

    def done_of(self, job: Job) -> float:
        """Seconds of a running computation's work that are done."""
        self._advance()
        return job.work - job.left

    def cut(self, job: Job, work: float) -> None:
        """Let a running computation end when this much of its work is done; that cannot be less than was done."""
        self._advance()
        job.left = max(0.0, work - (job.work - job.left))
        job.work = work
        self._plan()

    def _advance(self) -> None:
        now, num = self._loop.now, len(self._jobs)
        passed = now - self._last
        self._last = now
        if not num or passed <= 0:
            return
        if num <= self.lanes:
            for job in self._jobs:
                job.left -= passed
            self.busy_s += passed * num
        else:
            each = passed * self.lanes / num
            for job in self._jobs:
                job.left -= each
            self.busy_s += passed * self.lanes

    def _plan(self) -> None:
        """Come back when the next computation ends. What was planned before is out of date."""
        self._version += 1
        jobs = self._jobs
        if not jobs:
            self._next = None
            return
        job = jobs[0] if len(jobs) == 1 else min(jobs, key=_left)
        self._next = job
        slower = len(jobs) / self.lanes
        left = job.left if job.left > 0 else 0.0
        self._loop.at(self._loop.now + (left if slower <= 1 else left * slower), self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        job = self._next
        assert job is not None
        self._jobs.remove(job)
        self.work_s += job.work
        self._plan()
        job.done(job.argument)


def _left(job: Job) -> float:
    return job.left


class Station(Generic[T]):
    """A first-come, first-served queue in front of a device.

    Args:
        workers: Computations at a time.

    Attributes:
        num_in, num_out: Pieces of work that came and went.
    """

    __slots__ = ("_device", "_num_running", "_queue", "_workers", "is_open", "num_in", "num_out", "queued_s")

    def __init__(self, device: Device, workers: int) -> None:
        self._device, self._workers = device, workers
        self._queue: deque[tuple[float, Callable[[T], None], T]] = deque()
        self._num_running = self.num_in = self.num_out = 0
        self.queued_s = 0.0
        self.is_open = True

    @property
    def num_held(self) -> int:
        """Waiting and running."""
        return self.num_in - self.num_out

    def put(self, work: float, done: Callable[[T], None], argument: T) -> None:
        """Compute for `work` seconds when it is this piece's turn, then call `done`."""
        self.num_in += 1
        self.queued_s += work
        if self._num_running < self._workers:
            self._begin(work, done, argument)
        else:
            self._queue.append((work, done, argument))

    def take_waiting(self) -> list[tuple[float, Callable[[T], None], T]]:
        """Remove what has not begun, for another station."""
        taken = list(self._queue)
        self._queue.clear()
        self.num_in -= len(taken)
        self.queued_s -= sum(work for work, _, _ in taken)
        return taken

    def _begin(self, work: float, done: Callable[[T], None], argument: T) -> None:
        self._num_running += 1
        self._device.start(work, self._ended, (work, done, argument))

    def _ended(self, piece: tuple[float, Callable[[T], None], T]) -> None:
        work, done, argument = piece
        self._num_running -= 1
        self.num_out += 1
        self.queued_s -= work
        if self._queue:
            self._begin(*self._queue.popleft())
        done(argument)
