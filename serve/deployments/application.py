"""The application on Ray: three deployments, each with its own replicas and resources, and the process around them."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray
from ray import _raylet
from ray import serve as ray_serve
from ray._private import ray_constants
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from serve.config import ServeConfig
from serve.deployments import node
from serve.deployments.decoder import Decoder
from serve.deployments.encoder import Encoder
from serve.deployments.environment import UnsafeRay, prepare_environment
from serve.deployments.ingress import APPLICATION, build_ingress
from serve.deployments.loopback import open_ports
from serve.deployments.router import STATS_PERIOD_S, LeastLoadedRouter

log = logging.getLogger(__name__)

NO_LIMIT = 1_000_000
"""The ingress admits requests itself, so that a refusal is an answer in OpenAI's form."""
HEALTH_CHECK_PERIOD_S = 1.0
"""The controller replaces a dead replica after this time at most."""
HEALTH_CHECK_TIMEOUT_S = 10.0
"""A replica that does not answer for this long, three times in a row, is replaced too."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN_MARGIN_S = 5.0
"""What Serve itself takes to delete an application, beyond the drain timeout."""


def build_application(config: ServeConfig) -> ray_serve.Application:
    """The Serve application of `config`, to be given to `ray.serve.run`."""
    config = config.with_threads()
    encoder = Encoder.options(
        num_replicas=config.num_encoders,
        max_ongoing_requests=config.max_ongoing_requests,
        request_router_config=_router("Encoder"),
        ray_actor_options={"num_cpus": config.encoder_cpus, "num_gpus": config.encoder_gpus},
        **_lifetime(config),
    )
    decoder = Decoder.options(
        max_ongoing_requests=config.max_ongoing_requests,
        request_router_config=_router("Decoder"),
        ray_actor_options={"num_cpus": config.decoder_cpus, "num_gpus": config.decoder_gpus},
        **_replicas(config),
        **_lifetime(config),
    )
    ingress = build_ingress(config).options(
        num_replicas=config.num_ingress,
        max_ongoing_requests=NO_LIMIT,
        ray_actor_options={"num_cpus": config.ingress_cpus},
        **_lifetime(config),
    )
    return ingress.bind(encoder.bind(config), decoder.bind(config))


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


@contextlib.contextmanager
def serving(config: ServeConfig, on_end: Callable[[], None] | None = None) -> Iterator[node.Node]:
    """A Ray of our own with the application running on it; taken down on leaving, whatever happened.

    Args:
        on_end: Called from a thread if Ray ends by itself. None interrupts the main thread.

    Raises:
        RayDidNotStart: The machine is too busy, Ray cannot run on it, or a replica cannot start.
        UnsafeRay: Ray would be open to other machines.
    """
    prepare_environment(config.host)
    # Ray read this when it was imported; see `RAY_SETTINGS`.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] != "0"
    _raylet.Config.initialize("")  # pyright: ignore[reportAttributeAccessIssue]
    options = {
        "num_cpus": int(config.ray_cpus or max(os.cpu_count() or 1, config.total_cpus + 1)),
        "object_store_memory": config.object_store_bytes,
        "include_dashboard": False,
        "configure_logging": False,
        "log_to_driver": False,
    }
    ray_node = node.start(options, on_end or _thread.interrupt_main, partial(_start_serve, config))
    try:
        _run_application(config)
        if ports := open_ports(ray_node.mark, but=config.port):
            raise UnsafeRay(f"Ray listens where other machines may reach it: {', '.join(ports)}")
        yield ray_node
    except KeyboardInterrupt:
        if ray_node.failure is None:
            raise
        raise node.RayEnded(f"Ray ended while the server ran: {ray_node.failure}") from None
    finally:
        _take_down(config, ray_node)


def _start_serve(config: ServeConfig, ray_node: node.Node) -> None:
    """Connect to the node and start Serve's controller and proxy there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=ray_node.address, configure_logging=False, log_to_driver=False)
        _restore(before)  # Ray's own handler for SIGTERM aborts the process
        ray_serve.start(http_options=HTTPOptions(host=config.host, port=config.port), proxy_location="HeadOnly")  # type: ignore[arg-type]
    except BaseException:
        ray.shutdown()
        raise


def _run_application(config: ServeConfig) -> None:
    try:
        # Where the number of decoders is fixed, an operator may change it through Ray's controller.
        ray_serve.run(
            build_application(config),
            name=APPLICATION,
            route_prefix="/",
            external_scaler_enabled=config.max_decoders is None,
        )
    except RuntimeError as error:
        raise node.RayDidNotStart(
            f"the model could not be served on Ray: {node.one_line(error)}. Ray's logs have the reason "
            "(/tmp/ray/session_latest/logs/serve), and so has mm serve --in-process"
        ) from error


def _take_down(config: ServeConfig, ray_node: node.Node) -> None:
    """Let the replicas finish what they have begun, within the drain timeout, and end all processes."""
    if ray_node.failure is None and ray.is_initialized():
        with contextlib.suppress(Exception):
            ray_serve.delete(APPLICATION, _blocking=False)
            deadline = time.monotonic() + config.drain_timeout_s + DRAIN_MARGIN_S
            while APPLICATION in ray_serve.status().applications and time.monotonic() < deadline:
                time.sleep(0.1)
        ray.shutdown()
    ray_node.close()


def run_on_ray(config: ServeConfig, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then shut everything down.

    Args:
        on_ready: Called once the first request can be answered.

    Raises:
        RayDidNotStart: The machine is too busy, Ray cannot run on it, or a replica cannot start.
        RayEnded: Ray's processes ended while the server ran.
        UnsafeRay: Ray would be open to other machines.
    """
    stop = threading.Event()
    before = _on_signal(_interrupt)
    try:
        with serving(config, stop.set) as ray_node:
            _on_signal(lambda *_: stop.set())
            if on_ready is not None:
                on_ready()
            stop.wait()
            if ray_node.failure is not None:
                raise node.RayEnded(f"Ray ended while the server ran: {ray_node.failure}")
    except KeyboardInterrupt:
        log.info("stopped before the server was ready")
    finally:
        _restore(before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _on_signal(handler: Callable[..., None]) -> dict[signal.Signals, Any]:
    """Set the handler of SIGINT and SIGTERM; the handlers that were there before."""
    return {number: signal.signal(number, handler) for number in SIGNALS}


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
