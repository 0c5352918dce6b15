"""A Ray cluster of several nodes on this machine, in a process of its own, which answers questions about it.

Run python -m tests.helpers.ray_cluster NODE.json... and write commands to its standard input, one a line. It first
prints the cluster's address, then one line of JSON for each command, and ends all of Ray when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ATTEMPTS = 4


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    cluster = Cluster()
    try:
        for options in sys.argv[1:]:
            _add(cluster, json.loads(options))
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        print(cluster.address, file=answers, flush=True)
        for line in sys.stdin:
            command, *arguments = line.split()
            print(json.dumps(COMMANDS[command](*arguments)), file=answers, flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _add(cluster: Any, options: dict[str, Any]) -> None:
    """Add a node. On a busy machine its agents may be too slow for its raylet, and it is tried again."""
    for attempt in range(ATTEMPTS):
        try:
            cluster.add_node(**options)
            return
        except Exception:
            if attempt + 1 == ATTEMPTS or cluster.head_node is None:
                raise


def places() -> dict[str, list[str]]:
    """Label `name` of the node of each running replica, by application and deployment."""
    import ray
    from ray.serve.context import _get_global_client

    names = {node["NodeID"]: node["Labels"].get("name", "") for node in ray.nodes()}
    client = _get_global_client(raise_if_no_controller_running=False)
    applications = {} if client is None else client.get_serve_details()["applications"]
    return {
        f"{name}/{deployment}": sorted(
            names[one["node_id"]] for one in details["replicas"] if one["state"] == "RUNNING"
        )
        for name, application in applications.items()
        for deployment, details in application["deployments"].items()
    }


def deploy(path: str) -> dict[str, Any]:
    """What `serve deploy` asks of the controller. Returns when the applications of the file run, or one has failed."""
    import yaml
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    with open(path, encoding="utf-8") as file:
        schema = ServeDeploySchema.model_validate(yaml.safe_load(file))
    _get_global_client().deploy_apps(schema)
    names = [one.name for one in schema.applications]
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = serve.status().applications
        statuses = [found[name].status if name in found else "" for name in names]
        if all(status == "RUNNING" for status in statuses) or "DEPLOY_FAILED" in statuses:
            break
        time.sleep(0.3)
    return {name: [found[name].status, found[name].message] for name in names}


COMMANDS: dict[str, Any] = {"places": places, "deploy": deploy}


class RayCluster:
    """A running cluster.

    Attributes:
        address: HOST:PORT.
        env: Environment of those who use it; it has the token.
    """

    def __init__(self, process: subprocess.Popen[str], env: dict[str, str]) -> None:
        self._process, self.env = process, env
        self.address = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())


@contextlib.contextmanager
def ray_cluster(*nodes: dict[str, Any]) -> Iterator[RayCluster]:
    """A cluster of these nodes, the head first; each is the keyword arguments of `Cluster.add_node`."""
    from serve.deployments.processes import MARK, kill_marked

    mark = secrets.token_hex(8)
    env = os.environ | {
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.ray_cluster", *map(json.dumps, nodes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        cluster = RayCluster(process, env)
        assert cluster.address, "the cluster did not start"
        yield cluster
    finally:
        process.communicate(timeout=60)
        kill_marked(mark)


if __name__ == "__main__":
    main()
