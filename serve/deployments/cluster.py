"""The Ray cluster that this process is connected to: what its nodes have, and what Serve runs there already."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.serve.context import _get_global_client

from mm.errors import MmError
from serve.config import ServeConfig
from serve.deployments.node import one_line
from serve.deployments.placement import Node

PROBE_S = 5.0


class ClusterUnusable(MmError):
    """The cluster cannot be reached, or what runs there stands in the way."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """What Serve runs on the cluster.

    Attributes:
        host, port: Where its proxies listen.
        routes: Route prefix of each application, by its name.
    """

    host: str
    port: int
    routes: dict[str, str | None]


def connect(address: str) -> None:
    """Connect this process to a cluster that runs.

    Args:
        address: "auto", or HOST:PORT of its GCS.

    Raises:
        ClusterUnusable: It cannot be reached from here.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
        except (OSError, OverflowError) as error:
            raise ClusterUnusable(
                f"no Ray cluster answers at {address} ({error}); give what ray start printed"
            ) from None
    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except Exception as error:  # Ray raises plain exceptions, of many kinds
        raise ClusterUnusable(
            f"the Ray cluster at {address} cannot be used from here: {one_line(error)}. mm serve --address runs on a "
            "node of the cluster (ray start --address=...), with the cluster's token (RAY_AUTH_TOKEN); from elsewhere "
            "use serve deploy"
        ) from error


def nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to; none if it is not."""
    if not ray.is_initialized():
        return []
    free = available_resources_per_node()
    return [
        Node(total=node["Resources"], free=free.get(node["NodeID"], node["Resources"]), labels=node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def emptied(nodes: Sequence[Node]) -> list[Node]:
    """The same nodes as if nothing ran there: an application that is deployed anew takes the place of itself."""
    return [replace(node, free=node.total) for node in nodes]


def may_grow() -> bool:
    """Whether an autoscaler may add nodes. Then only time can tell whether there is room."""
    with contextlib.suppress(Exception):  # private, and absent where no autoscaler ever reported
        config = state.get_cluster_config()
        return config is not None and any(group.max_count != 0 for group in config.node_group_configs)
    return False


def running_serve() -> Running | None:
    """What Serve runs on the connected cluster; None if it does not run."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    applications = client.get_serve_details()["applications"]
    http = client.http_config
    return Running(
        host=http.host, port=http.port, routes={name: one["route_prefix"] for name, one in applications.items()}
    )


def check_free(there: Running, config: ServeConfig) -> None:
    """Refuse a name or a route that another application has, and a port where Serve does not listen.

    Raises:
        ClusterUnusable: Names the option that helps.
    """
    if config.app_name in there.routes:
        raise ClusterUnusable(
            f"an application named {config.app_name!r} runs on this cluster already; give another --app-name, or take "
            f"that one down: serve delete {config.app_name}"
        )
    if taken := next((name for name, route in there.routes.items() if route == config.route_prefix), None):
        raise ClusterUnusable(
            f"the application {taken!r} answers at {config.route_prefix} already; give another --route-prefix, such as "
            f"/{config.app_name}"
        )
    asked = ServeConfig(model=config.model)
    for name, has in (("host", there.host), ("port", there.port)):
        given = getattr(config, name)
        if given not in (has, getattr(asked, name)):
            raise ClusterUnusable(
                f"Serve listens at {there.host}:{there.port} on this cluster, and --{name} {given} asks for another; "
                f"leave --{name} out"
            )
