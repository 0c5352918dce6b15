"""The environment of the Ray that a server starts for itself: loopback only, with a token, and tuned.

Nothing here imports Ray, which reads most of these variables when it is imported.
"""

from __future__ import annotations

import os
import secrets

from mm.errors import MmError

LOOPBACK = "127.0.0.1"
LOCAL_HOSTS = (LOOPBACK, "localhost", "::1")

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without clusters of several machines every process of Ray listens on 127.0.0.1. The variable works on Linux too.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Whoever reaches a port of Ray may run code. So other users of this machine need the token as well.
    "RAY_AUTH_MODE": "token",
    # Ray starts its workers at niceness 15. Any other load on the machine would then slow a replica down.
    "RAY_worker_niceness": "0",
    # Workers that nobody has asked for would be started while the node's own processes start.
    "RAY_prestart_worker_first_driver": "0",
    # Agents notice at once that their raylet is gone, and not after a minute.
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
    # Replicas compute in threads of their own. Their event loops are free, and need no second loop beside them.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Short messages between replicas go straight over gRPC, which halves a hop; large bodies need its limit raised.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),
    # A proxy that died is noticed after a second, and not after ten.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A replica that does not answer is killed, so that its streams end. Asking it to finish them would take minutes.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # A busy machine may need longer than the default half minute to start the node.
    "RAY_raylet_start_wait_time_s": "120",
}
"""Variables of a Ray that is started here, where the operator has not set them otherwise."""

OF_CONTROLLER = ("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS")
CONTROLLER_SETTINGS = {name: RAY_SETTINGS[name] for name in OF_CONTROLLER}
"""Those of Serve's controller, where it is started on a cluster that runs already."""
REPLICA_SETTINGS = {
    name: value for name, value in RAY_SETTINGS.items() if name.startswith("RAY_SERVE_") and name not in OF_CONTROLLER
}
"""Those that replicas bring along to a cluster that was started without them."""


class UnsafeRay(MmError):
    """Ray would let others run code."""


def prepare_environment(host: str) -> None:
    """Set what is not set, for Ray's processes and for this one.

    The token is a new one for each server, unless `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH` gives it.

    Args:
        host: The address that the server will listen on.

    Raises:
        UnsafeRay: The operator switched the token off, and the server is to be reached from other machines.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    mode = os.environ["RAY_AUTH_MODE"]
    if mode != "token" and host not in LOCAL_HOSTS:
        raise UnsafeRay(
            f"RAY_AUTH_MODE is {mode!r}, so whoever reaches a port of Ray could run code here, and --host {host} "
            f"opens this machine to others. Unset RAY_AUTH_MODE, or listen on {LOOPBACK}"
        )
    if mode == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
