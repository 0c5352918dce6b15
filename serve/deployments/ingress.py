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

APPLICATION = "mm"


def build_ingress(config: ServeConfig) -> ray_serve.Deployment:
    """The ingress deployment, still to be bound to an encoder and a decoder."""

    def build_app() -> FastAPI:
        keep_replica_local()
        encoder = ray_serve.get_deployment_handle("Encoder", app_name=APPLICATION)
        decoder = ray_serve.get_deployment_handle("Decoder", app_name=APPLICATION)
        runtime = RayRuntime(encoder, decoder, default_reducer(config))
        # Serve's proxy puts x-request-id on the answer itself.
        return application_of(runtime, config, echo_request_id=False)

    deployment: ray_serve.Deployment = cast(Any, ray_serve.deployment)(ray_serve.ingress(build_app)(), name="Ingress")
    return deployment
