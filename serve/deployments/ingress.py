"""The ingress replica: the same HTTP application as in process, over handles."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from fastapi import FastAPI
from ray import serve as ray_serve

from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.deployments.ray_runtime import RayRuntime
from serve.runtime import default_reducer

APPLICATION = "mm"
HEALTH_TTL_S = 1.0


class ReplicaHealth:
    """Whether every deployment has a running replica, asked of the controller at most once in `HEALTH_TTL_S`."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._healthy = False
        self._lock = asyncio.Lock()

    async def __call__(self) -> bool:
        async with self._lock:
            if time.monotonic() - self._asked > HEALTH_TTL_S:
                self._healthy = await asyncio.to_thread(self._ask)
                self._asked = time.monotonic()
            return self._healthy

    def _ask(self) -> bool:
        application = ray_serve.status().applications.get(APPLICATION)
        if application is None:
            return False
        return all(_num_running(deployment) > 0 for deployment in application.deployments.values())


def _num_running(deployment: Any) -> int:
    return deployment.replica_states.get("RUNNING", 0)


def build_ingress(config: ServeConfig) -> ray_serve.Deployment:
    """The ingress deployment, still to be bound to an encoder and a decoder."""

    def build_app() -> FastAPI:
        encoder = ray_serve.get_deployment_handle("Encoder", app_name=APPLICATION)
        decoder = ray_serve.get_deployment_handle("Decoder", app_name=APPLICATION)
        runtime = RayRuntime(encoder, decoder, default_reducer(config), ReplicaHealth())
        # Serve's proxy puts x-request-id on the answer itself.
        return create_app(runtime, config, echo_request_id=False)

    deployment: ray_serve.Deployment = cast(Any, ray_serve.deployment)(ray_serve.ingress(build_app)(), name="Ingress")
    return deployment
