"""Calls to replicas: their errors, and the attempts that follow a loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from mm.data.request import Request
from mm.errors import CapacityError
from serve.deployments.affinity import named
from serve.deployments.availability import SILENT_S
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
    try:
        raise loss
    finally:
        del loss, attempt  # else the error would hold itself through its traceback, and with it the request


async def first(events: AsyncGenerator[T]) -> T:
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


async def ping(handle: DeploymentHandle) -> None:
    """Ask every replica for a sign of life. Raises if none gives one; calls to dead ones tell the router."""
    answers = await handle.broadcast("ping").results_async(timeout_s=SILENT_S, return_exceptions=True)
    if all(isinstance(answer, Exception) for answer in answers):
        raise Unavailable("no replica answers")


def without_media(request: Request) -> Request:
    """What the decoder needs of a request; pixels and files never travel to it."""
    return replace(request, media=())


async def result_of(method: Any, *arguments: Any) -> Any:
    """A replica's result. Its errors are raised as what they are."""
    response = method.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        raise unwrapped(error) from None


async def items_of(method: Any, *arguments: Any) -> AsyncGenerator[Any]:
    response = method.remote(*arguments)
    try:
        async for item in response:
            yield item
    except Exception as error:
        raise unwrapped(error) from None
    finally:
        response.cancel()


def to_first(method: Any, order: list[str]) -> Any:
    """A method of a deployment whose call goes to the first of these replicas that takes it."""
    return method.options(session_id=named(order)) if order else method
