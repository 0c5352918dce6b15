"""The application on Ray: a deployment for each stage, with its own replicas and resources, from settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from mm.errors import InvalidOption
from mm.settings import build as build_settings
from mm.settings import environment_settings, plain_settings
from serve.config import ServeConfig
from serve.deployments import cluster
from serve.deployments.decoder import Decoder
from serve.deployments.encoder import Encoder
from serve.deployments.environment import REPLICA_SETTINGS
from serve.deployments.ingress import build_ingress
from serve.deployments.placement import Demand, Node, NotEnoughResources, demands, problem
from serve.deployments.prefill import Prefill
from serve.deployments.router import STATS_PERIOD_S, LeastLoadedRouter
from serve.deployments.whole import Whole

NO_LIMIT = 1_000_000
"""The ingress admits requests itself, so that a refusal is an answer in OpenAI's form."""
HEALTH_CHECK_PERIOD_S = 1.0
"""The controller replaces a dead replica after this time at most."""
HEALTH_CHECK_TIMEOUT_S = 10.0
"""A replica that does not answer for this long, three times in a row, is replaced too."""

RAYS_OWN = {
    "address": "leave it out",
    "host": "http_options.host of the file",
    "port": "http_options.port of the file",
    "app_name": "the option --name, or the application's name in the file",
    "route_prefix": "the option --route-prefix, or the application's route_prefix in the file",
    "ray_cpus": "leave it out",
    "object_store_bytes": "ray start --object-store-memory",
    "header_timeout_s": "the proxy reads headers",
    "drain_timeout_s": "replicas get request_timeout_s to finish",
}
"""Settings that the application's arguments cannot decide, and what does."""


def build_application(
    config: ServeConfig, nodes: Sequence[Node] = (), variables: Mapping[str, str] | None = None
) -> ray_serve.Application:
    """The Serve application of `config`, to be given to `ray.serve.run`.

    Args:
        nodes: Of the cluster on which it will run; they decide what the device "auto" is.
        variables: Of the replicas' environment, beside what their node has.
    """
    asked = {demand.stage: demand for demand in demands(config, nodes)}
    ingress = build_ingress(config).options(
        num_replicas=config.num_ingress,
        max_ongoing_requests=NO_LIMIT,
        **_placed(asked["ingress"], variables),
        **_lifetime(config),
    )

    def stage(deployment: ray_serve.Deployment, demand: Demand, replicas: Mapping[str, Any]) -> ray_serve.Application:
        name = f"{config.deployment_prefix}{deployment.name}"
        placed = deployment.options(
            name=name,
            max_ongoing_requests=config.max_ongoing_requests,
            request_router_config=_router(name),
            **replicas,
            **_placed(demand, variables),
            **_lifetime(config),
        )
        return placed.bind(config)

    whole = config.split == "none"
    found = [stage(Whole if whole else Decoder, asked["decoder"], _replicas(config))]
    if "encoder" in asked:
        found.insert(0, stage(Encoder, asked["encoder"], {"num_replicas": config.num_encoders}))
    if "prefill" in asked:
        found.append(stage(Prefill, asked["prefill"], {"num_replicas": config.num_prefills}))
    return ingress.bind(*found)


def build(args: dict[str, Any]) -> ray_serve.Application:
    """The application from plain data: `serve run serve.deployments.application:build model=tiny num_encoders=2`, or
    the `args` of a file for `serve deploy`.

    Args:
        args: Settings of `mm serve` by name. Texts may stand for numbers.

    Raises:
        InvalidOption: A name is unknown, a value cannot be used, or Ray's own file has to say it.
        NotEnoughResources: The cluster could not hold the replicas.
    """
    config = application_config(args)
    nodes = cluster.nodes()
    if nodes and not cluster.may_grow():
        empty = cluster.emptied(nodes)
        if reason := problem(demands(config, empty), empty):
            raise NotEnoughResources(reason)
    return build_application(config, nodes, REPLICA_SETTINGS)


def application_config(args: Mapping[str, Any]) -> ServeConfig:
    """The settings that an application's arguments describe.

    Raises:
        InvalidOption: As in `build`.
    """
    settings = plain_settings(ServeConfig, args, "args", has_texts=True)
    if name := next((name for name in settings if name in RAYS_OWN), None):
        raise InvalidOption("args", name, f"is not the application's to say: {RAYS_OWN[name]}")
    return build_settings(ServeConfig, settings, "args")


def __getattr__(name: str) -> Any:
    """`app`, for `serve build serve.deployments.application:app`: its settings are the `MM_...` variables."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(environment_settings(ServeConfig))


def _placed(demand: Demand, variables: Mapping[str, str] | None) -> dict[str, Any]:
    """Where Ray may put the replicas of a deployment, and what their environment has."""
    options = dict(demand.options)
    if variables:
        options["runtime_env"] = {"env_vars": dict(variables)}
    placed: dict[str, Any] = {"ray_actor_options": options}
    if demand.max_per_node is not None:
        placed["max_replicas_per_node"] = demand.max_per_node
    return placed


def _router(deployment: str) -> RequestRouterConfig:
    """How the ingress chooses among the replicas of a deployment."""
    return RequestRouterConfig.model_validate(
        {
            "request_router_class": LeastLoadedRouter,
            "request_router_kwargs": {"deployment": deployment},
            "request_routing_stats_period_s": STATS_PERIOD_S,
        }
    )


def _lifetime(config: ServeConfig) -> dict[str, Any]:
    """When a replica counts as lost, and how long one that is taken away may finish its requests."""
    return {
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        # A replica that is not needed any more is in no hurry. When the server stops, `serving` waits less.
        "graceful_shutdown_timeout_s": config.request_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def _replicas(config: ServeConfig) -> dict[str, Any]:
    """A fixed number of decoders, or as many between two bounds as the requests under way fill."""
    if config.max_decoders is None:
        return {"num_replicas": config.num_decoders}
    bounds = AutoscalingConfig(
        min_replicas=config.num_decoders,
        max_replicas=config.max_decoders,
        target_ongoing_requests=config.model.max_num_seqs,
    )
    return {"autoscaling_config": bounds}
