"""The process around an application: on a Ray of its own, or on a cluster that runs already."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import _raylet
from ray import serve as ray_serve
from ray._private import ray_constants
from ray.serve.config import ControllerOptions, HTTPOptions
from ray.serve.schema import ApplicationStatusOverview

from serve.config import ServeConfig
from serve.deployments import cluster, node
from serve.deployments.application import build_application
from serve.deployments.environment import (
    CONTROLLER_SETTINGS,
    LOCAL_HOSTS,
    REPLICA_SETTINGS,
    UnsafeRay,
    prepare_environment,
)
from serve.deployments.loopback import open_ports
from serve.deployments.placement import NotEnoughResources, demands, problem

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN_MARGIN_S = 5.0
"""What Serve itself takes to delete an application, beyond the drain timeout."""
POLL_S = 0.2
SAY_S = 30.0
"""How often the log says what a start waits for."""
LOOK_S = 5.0
"""How often an application on a cluster of others is looked for."""
OVER = ("DEPLOY_FAILED", "UNHEALTHY")
HINTS = "--encoder-gpus, --prefill-gpus, --decoder-gpus, --encoder-cpus, --prefill-cpus and --decoder-cpus"
ERROR = re.compile(r"^(?:[\w.]*\.)?\w*(?:Error|Exception): (.+)|^(?:mm|serve)\.[\w.]+: (.+)", re.MULTILINE)


@dataclass
class Served:
    """An application that answers.

    Attributes:
        host, port: Where.
        failure: Why its Ray ended, if it did.
    """

    host: str
    port: int
    node: node.Node | None = None

    @property
    def failure(self) -> str | None:
        return None if self.node is None else self.node.failure


@contextlib.contextmanager
def serving(config: ServeConfig, on_end: Callable[[], None] | None = None) -> Iterator[Served]:
    """A running application: on the cluster that `config.address` names, or on a Ray of our own.

    It is taken down on leaving, whatever happened; so is a Ray of our own. Other applications of a cluster stay.

    Args:
        on_end: Called from a thread if a Ray of our own ends by itself. None interrupts the main thread.

    Raises:
        RayDidNotStart: The machine is too busy, Ray cannot run on it, or a replica cannot start.
        UnsafeRay: Ray would be open to other machines.
        NotEnoughResources: The replicas ask for more than there is.
        ClusterUnusable: The cluster cannot be reached, or another application has this name or route.
    """
    with _on_own_ray(config, on_end) if config.address is None else _on_cluster(config, config.address) as served:
        yield served


@contextlib.contextmanager
def _on_own_ray(config: ServeConfig, on_end: Callable[[], None] | None) -> Iterator[Served]:
    num_cpus = int(config.ray_cpus or max(os.cpu_count() or 1, config.total_cpus + 1))
    at = config.host, config.port
    ray_node = start_node(at, num_cpus, config.object_store_bytes, on_end or _thread.interrupt_main)
    try:
        _check_room(config)
        _deploy(config, None)
        if ports := open_ports(ray_node.mark, but=config.port):
            raise UnsafeRay(f"Ray listens where other machines may reach it: {', '.join(ports)}")
        yield Served(config.host, config.port, ray_node)
    except KeyboardInterrupt:
        if ray_node.failure is None:
            raise
        raise node.RayEnded(f"Ray ended while the server ran: {ray_node.failure}") from None
    finally:
        if ray_node.failure is None and ray.is_initialized():
            _delete(config)
            ray.shutdown()
        ray_node.close()


@contextlib.contextmanager
def _on_cluster(config: ServeConfig, address: str) -> Iterator[Served]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    cluster.connect(address)
    _restore(before)  # Ray's own handler for SIGTERM aborts the process
    try:
        _check_room(config)
        there = cluster.running_serve()
        if there is None:
            log.info("starting Serve on the cluster, with a proxy on each node that has replicas")
            ray_serve.start(
                http_options=HTTPOptions(host=config.host, port=config.port),
                proxy_location="EveryNode",
                controller_options=ControllerOptions(runtime_env={"env_vars": CONTROLLER_SETTINGS}),
            )
            there = cluster.Running(host=config.host, port=config.port, routes={})
        cluster.check_free(there, config)
        config = replace(config, host=there.host, port=there.port)
        if config.host not in LOCAL_HOSTS and not config.api_keys:
            log.warning("Serve listens on %s, and without an API key everyone who can reach it may use it", config.host)
        try:
            _deploy(config, REPLICA_SETTINGS)
            yield Served(there.host, there.port)
        finally:
            _delete(config)
    finally:
        ray.shutdown()


def start_node(
    at: tuple[str, int], num_cpus: int, object_store_bytes: int | None, on_end: Callable[[], None]
) -> node.Node:
    """A Ray of our own, to which this process is connected, and Serve on it. Whoever called it ends both.

    Args:
        at: Host and port at which Serve listens.
        on_end: Called from a thread if it ends by itself.

    Raises:
        RayDidNotStart, UnsafeRay: As in `serving`.
    """
    prepare_environment(at[0])
    # Ray read this when it was imported; see `RAY_SETTINGS`.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] != "0"
    _raylet.Config.initialize("")  # pyright: ignore[reportAttributeAccessIssue]
    options = {
        "num_cpus": num_cpus,
        "object_store_memory": object_store_bytes,
        "include_dashboard": False,
        "configure_logging": False,
        "log_to_driver": False,
    }
    return node.start(options, on_end, partial(_start_serve, *at))


def _start_serve(host: str, port: int, ray_node: node.Node) -> None:
    """Connect to the node and start Serve's controller and proxy there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=ray_node.address, configure_logging=False, log_to_driver=False)
        _restore(before)  # Ray's own handler for SIGTERM aborts the process
        ray_serve.start(http_options=HTTPOptions(host=host, port=port), proxy_location="HeadOnly")  # type: ignore[arg-type]
    except BaseException:
        ray.shutdown()
        raise


def _check_room(config: ServeConfig) -> None:
    """Refuse what Ray would wait for without end.

    Raises:
        NotEnoughResources: In one line, with what there is.
    """
    nodes = cluster.nodes()
    if (reason := problem(demands(config, nodes), nodes)) and not cluster.may_grow():
        raise NotEnoughResources(f"{reason}; ask for less with {HINTS}, or add nodes")


def _deploy(config: ServeConfig, variables: Mapping[str, str] | None) -> None:
    """Deploy the application and return when it answers."""
    nodes = cluster.nodes()
    # Where the number of decoders is fixed, an operator may change it through Ray's controller.
    target = ray_serve.RunTarget(
        target=build_application(config, nodes, variables),
        name=config.app_name,
        route_prefix=config.route_prefix,
        external_scaler_enabled=config.max_decoders is None,
    )
    ray_serve.run_many([target], wait_for_applications_running=False)
    said = began = time.monotonic()
    error = ""
    while (state := _state(config.app_name)) is None or state.status != "RUNNING":
        if state is not None and state.status in OVER:
            raise node.RayDidNotStart(
                f"the model could not be served on Ray: {_reason(state)}. Ray's logs have more "
                "(/tmp/ray/session_latest/logs/serve), and so has mm serve --in-process"
            )
        if state is not None and (latest := _replica_error(state)) not in ("", error):
            error = latest
            log.warning("a replica could not start, and Ray tries again: %s", error)
        if time.monotonic() - said > SAY_S and state is not None:
            said = time.monotonic()
            log.info("after %.0f s waiting for %s", said - began, _awaited(state))
        time.sleep(POLL_S)


def _state(name: str) -> ApplicationStatusOverview | None:
    return ray_serve.status().applications.get(name)


def _awaited(state: ApplicationStatusOverview) -> str:
    """The deployments of an application that are not ready, and what Serve says of them."""
    waiting = [
        f"{name} ({' '.join(one.message.split())[:120] or 'its replicas load'})"
        for name, one in state.deployments.items()
        if one.status != "HEALTHY"
    ]
    return ", ".join(waiting) or "the application"


def _reason(state: ApplicationStatusOverview) -> str:
    """Why an application failed: the error at the end of a replica's traceback, or what Serve says first."""
    return _replica_error(state) or node.one_line(RuntimeError(state.message))


def _replica_error(state: ApplicationStatusOverview) -> str:
    """The error at the end of a replica's traceback; empty where none has one."""
    texts = [*(one.message for one in state.deployments.values()), state.message]
    found = [[one[1] or one[2] for one in ERROR.finditer(text)] for text in texts]
    return next((errors[-1].strip() for errors in found if errors), "")


def _delete(config: ServeConfig) -> None:
    """Let the replicas finish what they have begun, within the drain timeout. No other application is touched."""
    with contextlib.suppress(Exception):
        if _state(config.app_name) is None:
            return
        ray_serve.delete(config.app_name, _blocking=False)
        deadline = time.monotonic() + config.drain_timeout_s + DRAIN_MARGIN_S
        while _state(config.app_name) is not None and time.monotonic() < deadline:
            time.sleep(0.1)


def run_on_ray(config: ServeConfig, on_ready: Callable[[ServeConfig], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then take down what was started.

    Args:
        on_ready: Called once the first request can be answered, with the host and port where it is.

    Raises:
        MmError: As in `serving`.
        RayEnded: Ray's processes ended while the server ran, or somebody deleted the application.
    """
    stop = threading.Event()
    before = _on_signal(_interrupt)
    try:
        with serving(config, stop.set) as served:
            _on_signal(lambda *_: stop.set())
            if on_ready is not None:
                on_ready(replace(config, host=served.host, port=served.port))
            while not stop.wait(LOOK_S):
                if config.address is not None and _is_deleted(config.app_name):
                    raise node.RayEnded(f"the application {config.app_name!r} was deleted from the cluster")
            if served.failure is not None:
                raise node.RayEnded(f"Ray ended while the server ran: {served.failure}")
    except KeyboardInterrupt:
        log.info("stopped before the server was ready")
    finally:
        _restore(before)


def _is_deleted(name: str) -> bool:
    """Whether Serve says that the application is not there; it may say nothing while its controller restarts."""
    try:
        return _state(name) is None
    except Exception:
        return False


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _on_signal(handler: Callable[..., None]) -> dict[signal.Signals, Any]:
    """Set the handler of SIGINT and SIGTERM; the handlers that were there before."""
    return {number: signal.signal(number, handler) for number in SIGNALS}


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
