"""Calls to replicas: their errors, and the attempts that follow a loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from mm.data.outputs import Event
from mm.errors import CapacityError
from serve.runtime import StageMissing, Unavailable

T = TypeVar("T")

GONE = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    WorkerCrashedError,
    TaskCancelledError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
"""Errors of Ray that mean that a replica is not there."""

MAX_TRIES = 5
"""Replicas that one request may lose. A request that ends each of them has to end too."""
PAUSE_S = 0.1
"""Before a lost call is made again, times the calls so far: the loss has to reach the router."""


async def retried(attempt: Callable[[Unavailable | None], Awaitable[T]], loss: Unavailable | None = None) -> T:
    """The result of `attempt`, which is made again after it lost its replica. It gets the loss of the last attempt.

    Args:
        loss: Of an attempt that was made before.
    """
    for tries in range(1, MAX_TRIES + 1):
        try:
            return await attempt(loss)
        except StageMissing:
            raise
        except Unavailable as error:
            loss = error
        await asyncio.sleep(PAUSE_S * tries)
    assert loss is not None
    raise loss


async def first(events: AsyncGenerator[list[Event]]) -> list[Event]:
    return await anext(events)


def unwrapped(error: Exception) -> Exception:
    """The error inside Ray's wrapper. Ray's own failures become our errors."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        error = unwrapped(cause) if isinstance(cause, Exception) else error
    if isinstance(error, BackPressureError):
        return CapacityError("the server is busy; try again shortly")
    if isinstance(error, GONE):
        return Unavailable("a part of the server is restarting; try again shortly", 5)
    return error
