"""The ingress replica: the same HTTP application as in process, over handles."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.api.server import build_app as application_of
from serve.config import ServeConfig
from serve.deployments.handing import Gate
from serve.deployments.loopback import keep_replica_local
from serve.deployments.ray_runtime import RayRuntime
from serve.runtime import default_reducer


def build_ingress(config: ServeConfig) -> ray_serve.Deployment:
    """The ingress deployment, still to be bound to the other stages.

    It looks for them in its own application, whose name `serve run` and `serve deploy` may have chosen.
    """

    def build_app() -> FastAPI:
        keep_replica_local()
        runtime = _runtime(config)
        # Serve's proxy puts x-request-id on the answer itself.
        return application_of(runtime, config, echo_request_id=False)

    deployment: ray_serve.Deployment = cast(Any, ray_serve.deployment)(
        ray_serve.ingress(build_app)(), name=f"{config.deployment_prefix}Ingress"
    )
    return deployment


def _runtime(config: ServeConfig) -> RayRuntime:
    """The stages that the settings ask for, in this replica's application."""

    def handle(name: str) -> DeploymentHandle:
        return ray_serve.get_deployment_handle(f"{config.deployment_prefix}{name}")

    if config.split == "none":
        model = handle("Model")
        return RayRuntime(model, model, default_reducer(config))
    return RayRuntime(
        handle("Encoder"),
        handle("Decoder"),
        default_reducer(config),
        handle("Prefill") if config.split == "epd" else None,
        gate=Gate(config.model.max_num_seqs * config.num_prefills),
        transport=config.kv_transport,
        limits=config.model.limits,
    )
