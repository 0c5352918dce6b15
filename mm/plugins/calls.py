"""Calls of plugins that can end or hold nothing but their request.

A plugin is code of others. It may loop, sleep for ever, or raise `SystemExit`. So its methods run in a thread of their
own, and the caller waits for a limited time. After that the thread is asked to stop, by an exception that Python raises
in it, and is left to itself; the next call gets a new thread. Whatever a plugin raises becomes an error that names it.

A plugin that fails again and again is switched off for a while. Its calls then fail at once, with the reason. After
`retry_s` one call is tried, and the first that goes well switches it on again.

Two things cannot be stopped from inside a process. A native loop that holds Python's lock stops every thread, this
module's too. `os._exit` and a crash end the process. Both need somebody outside: whoever asks for `/health` gets no
answer, and replaces the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mm.config import PluginLimits
from mm.errors import DrafterFault, DrafterOff, MmError, PluginError, PluginFault, ReducerFault, ReducerOff
from mm.plugins.registry import PluginKind
from mm.plugins.threads import THREADS, Call, new_call, slow_callback

log = logging.getLogger(__name__)
T = TypeVar("T")

BUILT = "while it was built"
"""When a plugin is built. That is switched off apart from its other methods: where a fault keeps all
tokens, the reducer still has to be built."""
GRACE_S = 0.2
"""How long a call that is over time may take to stop when it is asked to."""
SLOW_S = 1.0
"""A call that takes longer may no longer hold a place that others wait for, see `while_slow`."""
LOOK_S = 0.25
"""How often an encoder's call is looked at for a reducer that takes too long inside it."""
MAX_STUCK_THREADS = 8
"""Threads of plugins that do not stop. With more of them, the process should be replaced."""
MAX_REASON_CHARS = 200
ESSENTIAL: frozenset[PluginKind] = frozenset({"encoder", "family"})
"""Without its encoder or its family a model does nothing. They are only switched off for being slow."""


@dataclass(frozen=True, kw_only=True)
class PluginOff:
    """A plugin that is switched off.

    Attributes:
        reason: The last fault.
        retry_in_s: Seconds until it is tried again.
    """

    kind: str
    name: str
    reason: str
    retry_in_s: float


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """How one half of a server does.

    Attributes:
        problems: Why it should be replaced; empty where it does its work.
        plugins_off: Plugins that failed again and again.
    """

    problems: tuple[str, ...] = ()
    plugins_off: tuple[PluginOff, ...] = ()


@dataclass
class _Record:
    """What is known of one plugin.

    Attributes:
        num_faults: By method, faults since the last call that went well.
    """

    num_faults: dict[str, int] = field(default_factory=dict[str, int])
    reason: str = ""
    off_until: float | None = None


class PluginCalls:
    """Calls plugins for one half of a model, and remembers which of them fail. Thread-safe.

    Args:
        clock: Replaced by tests.

    Attributes:
        thread_s: CPU seconds of all calls that ended, for callers that measure their own.
    """

    def __init__(self, limits: PluginLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or PluginLimits()
        self.thread_s = 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._records: dict[tuple[PluginKind, str, bool], _Record] = {}

    def call(
        self,
        kind: PluginKind,
        parts: tuple[str, ...],
        when: str,
        function: Callable[[], T],
        *,
        timeout_s: float,
        holds_all: bool = False,
    ) -> T:
        """What `function` returns, which calls a plugin.

        Args:
            parts: Names of the plugins that it calls. A fault is the first one's, if it is not known better.
            when: Where in a request, such as "before the decoder".
            timeout_s: Seconds that it may take.
            holds_all: Whether all requests wait for it. Then it is switched off the first time that it takes too long.

        Raises:
            MmError: What the plugin raised, if that is an error of ours.
            ReducerFault, DrafterFault, PluginFault: It failed, took too long, or is switched off.
        """
        self.check(kind, parts, when)
        call, thread = new_call(function), THREADS.take()
        thread.begin(call)
        try:
            over = self._wait(call, kind, parts[0], timeout_s)
        except BaseException:  # the caller is interrupted
            THREADS.abandon(thread)
            raise
        if over is not None:
            THREADS.abandon(thread)
            call.done.acquire(timeout=GRACE_S)
            over_kind, name, limit_s = over
            reason = f"took longer than {limit_s:g} s {when}"
            raise self._over(over_kind, name, when, reason, holds_all=holds_all)
        THREADS.give_back(thread)
        self.thread_s += call.thread_s
        return self._outcome(call, kind, parts, when)

    def _wait(
        self, call: Call[T], kind: PluginKind, name: str, timeout_s: float
    ) -> tuple[PluginKind, str, float] | None:
        """Wait for a call. Returns the plugin that took too long, with its limit."""
        if kind == "encoder":
            return self._wait_for_encoder(call, name, timeout_s)
        callback = slow_callback()
        if callback is not None and timeout_s > SLOW_S:
            if call.done.acquire(timeout=SLOW_S):
                return None
            callback()
            timeout_s -= SLOW_S
        if call.done.acquire(timeout=timeout_s):
            return None
        return kind, name if call.part is None else call.part[0], timeout_s

    def _wait_for_encoder(self, call: Call[T], name: str, timeout_s: float) -> tuple[PluginKind, str, float] | None:
        """As `_wait`. A reducer inside the tower has a shorter limit, which is its own."""
        until, of_part = time.monotonic() + timeout_s, self.limits.reducer_timeout_s
        while not call.done.acquire(timeout=min(LOOK_S, of_part)):
            now, part = time.monotonic(), call.part
            if part is not None and now - part[1] > of_part:
                return "reducer", part[0], of_part
            if now > until:
                return "encoder", name, timeout_s
        return None

    def _outcome(self, call: Call[T], kind: PluginKind, parts: tuple[str, ...], when: str) -> T:
        error, call.error = call.error, None
        if error is None:
            self._succeeded(kind, parts, when)
            return call.results[0]
        if isinstance(error, ReducerFault) and not isinstance(error, ReducerOff):
            self._count("reducer", error.reducer, when, error.message, weight=1)
        elif isinstance(error, DrafterFault) and not isinstance(error, DrafterOff):
            self._count("drafter", parts[0], when, error.message, weight=1)
        if isinstance(error, MmError):
            try:
                raise error
            finally:
                del error  # else it would hold itself through its traceback, and with it the request
        reason = f"failed {when}: {type(error).__name__}"
        if kind not in ESSENTIAL:  # of an encoder, the cause may be a client's picture
            self._count(kind, parts[0], when, reason, weight=1)
        raise _fault(kind, parts[0], reason) from error

    def _over(self, kind: PluginKind, name: str, when: str, reason: str, *, holds_all: bool) -> PluginError:
        """Count a call that took too long. Returns the error."""
        weight = self.limits.max_plugin_faults if holds_all else 1
        self._count(kind, name, when, reason, weight=weight, is_over=True)
        return DrafterFault(name, reason, is_over=True) if kind == "drafter" else _fault(kind, name, reason)

    def _succeeded(self, kind: PluginKind, parts: tuple[str, ...], when: str) -> None:
        if not self._records:
            return
        with self._lock:
            for name in parts:
                if (record := self._records.get((kind, name, when == BUILT))) is not None:
                    record.num_faults.pop(when, None)
                    record.num_faults.pop("", None)

    def _count(
        self, kind: PluginKind, name: str, when: str, reason: str, *, weight: int, is_over: bool = False
    ) -> None:
        """Count a fault, and switch the plugin off after too many in a row."""
        with self._lock:
            record = self._records.setdefault((kind, name, when == BUILT), _Record())
            when = "" if is_over else when
            record.num_faults[when] = record.num_faults.get(when, 0) + weight
            record.reason = reason[:MAX_REASON_CHARS]
            is_off = record.num_faults[when] >= self.limits.max_plugin_faults
            if is_off:
                record.off_until = self._clock() + self.limits.plugin_retry_s
        if is_off:
            log.error("switched off for %g s: %s=%s reason=%r", self.limits.plugin_retry_s, kind, name, reason)

    def check(self, kind: PluginKind, parts: tuple[str, ...], when: str = "") -> None:
        """Refuse plugins that are switched off. After `plugin_retry_s` one fault more switches them off again.

        Args:
            when: `BUILT` where they are to be built.

        Raises:
            ReducerOff, DrafterOff, PluginFault: One of them is off.
        """
        if not self._records:
            return
        for name in parts:
            with self._lock:
                record = self._records.get((kind, name, when == BUILT))
                left = None if record is None or record.off_until is None else record.off_until - self._clock()
                if record is None or left is None:
                    continue
                if left <= 0:
                    record.off_until = None
                    continue
                reason = record.reason
            raise _off(kind, name, reason, left)

    def status(self) -> StageStatus:
        """Which plugins are switched off, and what should be replaced."""
        now = self._clock()
        with self._lock:
            off = [
                PluginOff(kind=kind, name=name, reason=record.reason, retry_in_s=round(record.off_until - now, 1))
                for (kind, name, _), record in self._records.items()
                if record.off_until is not None and record.off_until > now
            ]
        problems = [f"the {one.kind} {one.name} {one.reason}" for one in off if one.kind in ESSENTIAL]
        if (num_stuck := THREADS.num_stuck) > MAX_STUCK_THREADS:
            problems.append(f"{num_stuck} threads of plugins do not stop")
        return StageStatus(problems=tuple(problems), plugins_off=tuple(off))


def _fault(kind: PluginKind, name: str, reason: str) -> PluginError:
    if kind == "reducer":
        return ReducerFault(name, reason)
    return DrafterFault(name, reason) if kind == "drafter" else PluginFault(kind, name, reason)


def _off(kind: PluginKind, name: str, reason: str, left_s: float) -> PluginError:
    retry_after_s = max(1, round(left_s))
    if kind == "reducer":
        return ReducerOff(name, reason, retry_after_s)
    if kind == "drafter":
        return DrafterOff(name, reason, retry_after_s)
    return PluginFault(kind, name, f"is switched off, since it failed again and again; the last time it {reason}")
