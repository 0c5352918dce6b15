"""Threads in which plugins run, so that a call that does not end can be left to itself.

A call that takes too long is asked to stop by an exception that Python raises in its thread. That ends whatever runs
Python code and does not catch everything. A thread that sleeps, or waits in a library, gets the exception afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from mm.errors import MmError, ReducerFault

T = TypeVar("T")

MAX_IDLE_THREADS = 8


class Stopped(BaseException):
    """Raised inside a plugin's thread when its time is over."""


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception asks this thread to stop: Ctrl-C, or the end of a plugin's time."""
    is_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, Stopped) or (is_main and isinstance(error, KeyboardInterrupt))


@dataclass
class Call(Generic[T]):
    """One call on its way through a thread.

    Attributes:
        function: Calls the plugin.
        num_threads, is_inference, stream: Settings of the caller's thread. torch keeps them per thread.
        done: Held until the call has ended.
        part: The reducer that runs inside it, and since when.
    """

    function: Callable[[], T]
    num_threads: int
    is_inference: bool
    stream: torch.cuda.Stream | None
    done: threading.Lock = field(default_factory=threading.Lock)
    results: list[T] = field(default_factory=list[T])
    error: BaseException | None = None
    thread_s: float = 0.0
    part: tuple[str, float] | None = None

    def run(self) -> None:
        start = time.thread_time()
        _here.call = self
        try:
            if torch.get_num_threads() != self.num_threads:
                torch.set_num_threads(self.num_threads)
            with torch.inference_mode(self.is_inference), torch.cuda.stream(self.stream):  # pyright: ignore[reportArgumentType]
                self.results.append(self.function())
        except BaseException as error:
            self.error = error
        self.thread_s = time.thread_time() - start
        self.done.release()


def new_call(function: Callable[[], T]) -> Call[T]:
    """A call of `function`, to be given to a thread."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    call = Call(function, torch.get_num_threads(), torch.is_inference_mode_enabled(), stream)
    call.done.acquire()
    return call


_here = threading.local()
"""What a thread does: `call`, the plugin's call that it runs; `callback`, see `while_slow`."""


def slow_callback() -> Callable[[], None] | None:
    """What this thread wants called when a plugin is slow, see `while_slow`."""
    return getattr(_here, "callback", None)


@contextlib.contextmanager
def plugin_errors(reducer: str, when: str) -> Generator[None]:
    """Makes what a reducer raises its fault, named; errors of ours pass.

    Args:
        when: Such as "before the decoder".
    """
    call: Call[Any] | None = getattr(_here, "call", None)
    if call is not None:
        call.part = reducer, time.monotonic()
    try:
        yield
    except MmError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise ReducerFault(reducer, f"failed {when}: {type(error).__name__}") from error
    finally:
        if call is not None:
            call.part = None


class PluginThread:
    """A thread that runs one call after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="plugin", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(Stopped):  # it may come late, when the call is over
            while (call := self._calls.get()) is not None:
                call.run()
                del call

    def begin(self, call: Call[T]) -> None:
        self._calls.put(call)

    def end(self) -> None:
        self._calls.put(None)

    def stop(self) -> None:
        """Ask what runs to stop. It does so when it next runs Python code, unless it catches everything."""
        self.end()
        if (ident := self._thread.ident) is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Stopped))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()


class _Threads:
    """The threads of all plugins of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[PluginThread] = []
        self._stopped: list[PluginThread] = []

    def take(self) -> PluginThread:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return PluginThread()

    def give_back(self, thread: PluginThread) -> None:
        with self._lock:
            if len(self._idle) < MAX_IDLE_THREADS:
                self._idle.append(thread)
                return
        thread.end()

    def abandon(self, thread: PluginThread) -> None:
        thread.stop()
        with self._lock:
            self._stopped = [*(one for one in self._stopped if one.is_alive), thread]

    @property
    def num_stuck(self) -> int:
        """Threads that were asked to stop and run still."""
        with self._lock:
            return sum(one.is_alive for one in self._stopped)


THREADS = _Threads()


@contextlib.contextmanager
def while_slow(callback: Callable[[], None]) -> Generator[None]:
    """Call `callback` when a reducer that this thread calls is slow.

    A thread that holds a place for which others wait gives it back then.
    """
    _here.callback = callback
    try:
        yield
    finally:
        _here.callback = None
