"""Keeps the ports of the Ray that a server started to this machine, and checks that they are.

Ray itself binds to 127.0.0.1 where its node has that address (see `serve.deployments.environment`). One port is left:
the one on which Serve's replicas listen for each other, which Serve opens on all interfaces.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica

from serve.deployments.environment import LOOPBACK
from serve.deployments.processes import listening


def keep_replica_local() -> None:
    """Let this replica's own port listen where its node does. Called before Serve opens it, from the constructor."""
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    add_port = replica.add_port_to_grpc_server  # pyright: ignore[reportPrivateImportUsage]

    def add_local_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", LOOPBACK))

    replica.add_port_to_grpc_server = add_local_port  # type: ignore[assignment]


def open_ports(mark: str, but: int) -> list[str]:
    """Addresses beside loopback on which marked processes listen, each with the process's name.

    Args:
        but: The port of the server itself, which may be open.
    """
    return [
        f"{address} ({name})"
        for name, address in listening(mark)
        if not _is_loopback(address) and not address.endswith(f":{but}")
    ]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].removeprefix("::ffff:")
    return host == "::1" or host.startswith("127.")
