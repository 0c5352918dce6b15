"""The ingress replica: the same HTTP application as in process, over handles."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI
from ray import serve as ray_serve

from serve.api.server import build_app as application_of
from serve.config import ServeConfig
from serve.deployments.loopback import keep_replica_local
from serve.deployments.ray_runtime import RayRuntime
from serve.runtime import default_reducer


def build_ingress(config: ServeConfig) -> ray_serve.Deployment:
    """The ingress deployment, still to be bound to an encoder and a decoder.

    It looks for them in its own application, whose name `serve run` and `serve deploy` may have chosen.
    """

    def build_app() -> FastAPI:
        keep_replica_local()
        encoder = ray_serve.get_deployment_handle(f"{config.deployment_prefix}Encoder")
        decoder = ray_serve.get_deployment_handle(f"{config.deployment_prefix}Decoder")
        runtime = RayRuntime(encoder, decoder, default_reducer(config))
        # Serve's proxy puts x-request-id on the answer itself.
        return application_of(runtime, config, echo_request_id=False)

    deployment: ray_serve.Deployment = cast(Any, ray_serve.deployment)(
        ray_serve.ingress(build_app)(), name=f"{config.deployment_prefix}Ingress"
    )
    return deployment
