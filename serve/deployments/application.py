"""The application on Ray: three deployments, each with its own replicas and resources, and the process around them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from mm.errors import MmError
from serve.config import ServeConfig
from serve.deployments.decoder import Decoder
from serve.deployments.encoder import Encoder
from serve.deployments.ingress import APPLICATION, build_ingress
from serve.deployments.router import STATS_PERIOD_S, LeastLoadedRouter

log = logging.getLogger(__name__)

NO_LIMIT = 1_000_000
"""The ingress admits requests itself, so that a refusal is an answer in OpenAI's form."""


RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts its workers at niceness 15. Any other load on the machine would then slow a replica down.
    "RAY_worker_niceness": "0",
    # Replicas compute in threads of their own. Their event loops are free, and need no second loop beside them.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Short messages between replicas go straight over gRPC, which halves a hop; large bodies need its limit raised.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),
    # A busy machine may need longer than the default half minute to start the node.
    "RAY_raylet_start_wait_time_s": "120",
}
"""Environment of a Ray that is started here, where the operator has not set it otherwise. Read by its processes."""


class RayDidNotStart(MmError):
    """No node came up on this machine."""


def build_application(config: ServeConfig) -> ray_serve.Application:
    """The Serve application of `config`, to be given to `ray.serve.run`."""
    config = config.with_threads()
    encoder = Encoder.options(
        num_replicas=config.num_encoders,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": config.encoder_cpus, "num_gpus": config.encoder_gpus},
    )
    decoder = Decoder.options(
        **_replicas(config),
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": LeastLoadedRouter, "request_routing_stats_period_s": STATS_PERIOD_S}
        ),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": config.decoder_cpus, "num_gpus": config.decoder_gpus},
    )
    ingress = build_ingress(config).options(
        num_replicas=config.num_ingress,
        max_ongoing_requests=NO_LIMIT,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": config.ingress_cpus},
    )
    return ingress.bind(encoder.bind(config), decoder.bind(config))


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


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[None]:
    """A Ray of our own with the application running on it; taken down on leaving, whatever happened.

    Raises:
        RayDidNotStart: The machine is too busy, or Ray cannot run on it.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        _start_node(config)
        ray_serve.start(http_options=HTTPOptions(host=config.host, port=config.port), proxy_location="HeadOnly")  # type: ignore[arg-type]
        ray_serve.run(build_application(config), name=APPLICATION, route_prefix="/")
        yield
    finally:
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                # Shutting down at once would cut streams. Deleting the application lets its replicas drain first.
                ray_serve.delete(APPLICATION)
            with contextlib.suppress(Exception):
                ray_serve.shutdown()
            ray.shutdown()


def _start_node(config: ServeConfig) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=int(config.ray_cpus or max(os.cpu_count() or 1, config.total_cpus + 1)),
            object_store_memory=config.object_store_bytes,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises plain exceptions, of many kinds
        raise RayDidNotStart(
            f"Ray did not start on this machine: {error}. Try again when the machine is less busy, see Ray's logs "
            "(/tmp/ray/session_latest/logs), or serve without Ray: mm serve --in-process"
        ) from error


def run_on_ray(config: ServeConfig, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then shut everything down.

    Args:
        on_ready: Called once the first request can be answered.
    """
    stop = threading.Event()
    before = _on_signal(stop)
    try:
        with serving(config):
            _on_signal(stop)  # again: starting Ray puts its own handler for SIGTERM in place, which aborts the process
            if on_ready is not None:
                on_ready()
            stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(stop: threading.Event) -> dict[signal.Signals, Any]:
    """Let SIGINT and SIGTERM set `stop`; the handlers that were there before."""
    return {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
