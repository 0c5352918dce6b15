"""Which stages have a replica, as one ingress knows it.

Nobody is asked per request. Ray's controller sends every router the replicas that run, and a router drops a replica
itself when a call finds its process dead. `serve.deployments.router` reports both here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from serve.runtime import StageMissing

T = TypeVar("T")

NEW_WAIT_S = 1.0
"""How long a request that nobody has begun waits for the first replica of a stage. Then it is refused."""
EXPECTED_OUTAGE_S = 10.0
"""Seconds until a lost replica is replaced, before the first measurement."""
PING_PERIOD_S = 1.0
PING_WAIT_S = 0.5
SILENT_S = 10.0
"""After this long without an answer to a ping a stage counts as silent. Shorter silence is a busy machine."""


STAGES: dict[str, Stage] = {}
"""Listeners for the number of replicas of a deployment, by its name. Only an ingress has entries."""


@dataclass
class Call:
    """A call to a replica.

    Attributes:
        is_accepted: Whether a replica has taken it. If that replica is lost, the call ends with an error.
        on_routed: Told which one.
    """

    is_accepted: bool = False
    on_routed: Callable[[str], None] | None = None

    def accepted_by(self, replica: str) -> None:
        """A replica has taken it."""
        self.is_accepted = True
        if self.on_routed is not None:
            self.on_routed(replica)


CURRENT_CALL: ContextVar[Call] = ContextVar("CURRENT_CALL")
"""The call that the running task makes. Routers run in tasks that this one started, so they see it too."""


class Stage:
    """The replicas of one deployment. Has to be made on the event loop that uses it.

    Args:
        name: What clients read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._present, self._gone = asyncio.Event(), asyncio.Event()
        self._gone.set()
        self._lost_at = time.monotonic()
        self._outage_s = EXPECTED_OUTAGE_S
        self._was_present = False

    @property
    def is_present(self) -> bool:
        """Whether at least one replica runs."""
        return self._present.is_set()

    def report(self, num_replicas: int) -> None:
        """Tell how many replicas run. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._set_present, num_replicas > 0)

    def _set_present(self, is_present: bool) -> None:
        if is_present == self.is_present:
            return
        if is_present:
            if self._was_present:
                self._outage_s = time.monotonic() - self._lost_at
            self._was_present = True
            self._gone.clear()
            self._present.set()
        else:
            self._lost_at = time.monotonic()
            self._present.clear()
            self._gone.set()

    async def wait_until_present(self, wait_s: float | None) -> None:
        """Return once there is a replica.

        Args:
            wait_s: None waits as long as it takes.

        Raises:
            StageMissing: There is none after `wait_s`.
        """
        try:
            async with asyncio.timeout(wait_s):
                await self._present.wait()
        except TimeoutError:
            raise self._missing() from None

    def _missing(self) -> StageMissing:
        left_s = self._outage_s - (time.monotonic() - self._lost_at)
        return StageMissing(self.name, max(1, math.ceil(left_s)))

    async def through(
        self, work: Coroutine[Any, Any, T], *, is_new: bool, on_routed: Callable[[str], None] | None = None
    ) -> T:
        """The result of `work`, a call to a replica of this stage.

        Ray keeps a call that found no replica until there is one. A request that came when the stage was lost is
        refused here after `NEW_WAIT_S`. Others wait until their deadline, of which the caller takes care.

        Args:
            is_new: Whether no replica of any stage has worked on the request.
            on_routed: Told the name of the replica that took the call.

        Raises:
            StageMissing: The stage has no replica.
        """
        arrived = time.monotonic()
        call = Call(on_routed=on_routed)
        result = asyncio.ensure_future(_marked(work, call))
        try:
            await _first_of(result, self._gone.wait())
            while not result.done() and not call.is_accepted:
                came_after_loss = is_new and self._lost_at - arrived < NEW_WAIT_S
                await self._present_or(result, NEW_WAIT_S if came_after_loss else None)
                await _first_of(result, self._gone.wait())
            return await result
        finally:
            await _cancel(result)

    async def _present_or(self, result: asyncio.Future[Any], wait_s: float | None) -> None:
        """Wait until there is a replica, or a result."""
        present = asyncio.ensure_future(self.wait_until_present(wait_s))
        await _first_of(result, present)
        if not result.done():
            present.result()


async def _marked(work: Coroutine[Any, Any, T], call: Call) -> T:
    CURRENT_CALL.set(call)
    return await work


async def _first_of(result: asyncio.Future[Any], other: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
    """Wait until one of them is done, and cancel `other` if it is not."""
    second = asyncio.ensure_future(other)
    try:
        await asyncio.wait({result, second}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(second)


async def _cancel(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.cancel()
        await asyncio.wait({future})


class Pulse:
    """Whether the replicas of a stage answer. They are asked once in `PING_PERIOD_S` at most, if anybody wants to know.

    Args:
        ping: Asks all replicas. It raises if none answers.
    """

    def __init__(self, ping: Callable[[], Awaitable[object]]) -> None:
        self._ping = ping
        self._asked = self._answered = float("-inf")
        self._silent_since: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def is_silent(self) -> bool:
        """Whether nothing has been heard for `SILENT_S`. Returns within `PING_WAIT_S`."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked > PING_PERIOD_S):
            self._asked = now
            self._asking = asyncio.ensure_future(self._ask())
        await asyncio.wait({self._asking}, timeout=PING_WAIT_S)
        return self._silent_since is not None and time.monotonic() - self._silent_since > SILENT_S

    async def _ask(self) -> None:
        """Ask once. A ping that never returns ends with the next one."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(SILENT_S):
                await self._ping()
        except Exception:
            self._silent_since = self._silent_since or began
        else:
            self._silent_since = None
