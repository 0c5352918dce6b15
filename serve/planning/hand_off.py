"""How long keys and values take from one replica to another one: over Ray Serve, on this machine.

A sender and a receiver are deployments of a Ray of their own, and this process stands where the ingress does: it asks
the one for tensors, and hands what it gets to the other. So a hand-off has both hops that it has in a server.

Whoever imports this module has called `serve.deployments.environment.prepare_environment`, which Ray reads as it is
imported.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from mm.engine.kv_transfer.messages import KVPiece
from serve.config import KVTransport
from serve.deployments.environment import LOOPBACK
from serve.deployments.launch import start_node
from serve.deployments.loopback import keep_replica_local
from serve.deployments.messages import Carried
from serve.deployments.transport import TRANSPORTS, fetched, sent

SIZES = (0, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Bytes of keys and values."""
MEASURED: tuple[KVTransport, ...] = ("auto", "object_store", "inline")
"""The first is what a server takes that was told nothing, and so does `mm plan`."""
STORE_BYTES = 256 << 20
NUM_WARM_UP = 5


@ray_serve.deployment(name="HandOffSender", ray_actor_options={"num_cpus": 0.1})
class Sender:
    def __init__(self) -> None:
        keep_replica_local()

    async def send(self, num_bytes: int, transport: KVTransport) -> Carried:
        rows = torch.zeros(num_bytes // 2, 1, 1, dtype=torch.uint8)
        piece = KVPiece(sequence=0, starts=(0,), counts=(len(rows),), keys=rows, values=rows.clone())
        return await sent(piece, TRANSPORTS[transport])


@ray_serve.deployment(name="HandOffReceiver", ray_actor_options={"num_cpus": 0.1})
class Receiver:
    def __init__(self) -> None:
        keep_replica_local()

    async def take(self, carried: Carried) -> int:
        return (await fetched(carried)).num_bytes


def measure_hand_off(repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Seconds over bytes of each transport that `mm serve` has, medians of `repeats`.

    Raises:
        RayDidNotStart: The machine is too busy, or Ray cannot run on it.
    """
    say("the hand-off between two replicas, on a Ray of its own")
    node = start_node((LOOPBACK, _free_port()), 2, STORE_BYTES, _nothing)
    try:
        targets = [
            ray_serve.RunTarget(target=one.bind(), name=one.name, route_prefix=None)  # type: ignore[attr-defined]
            for one in (Sender, Receiver)
        ]
        sender, receiver = ray_serve.run_many(targets)
        return asyncio.run(_measured(sender, receiver, repeats))
    finally:
        ray.shutdown()
        node.close()


async def _measured(sender: DeploymentHandle, receiver: DeploymentHandle, repeats: int) -> dict[str, Any]:
    return {
        name: {
            "bytes": list(SIZES),
            "seconds": [await _seconds(sender, receiver, size, name, repeats) for size in SIZES],
        }
        for name in MEASURED
    }


async def _seconds(
    sender: DeploymentHandle, receiver: DeploymentHandle, num_bytes: int, transport: KVTransport, repeats: int
) -> float:
    send = sender.options(_by_reference=transport != "inline").send
    times = list[float]()
    for _ in range(repeats + NUM_WARM_UP):
        start = time.perf_counter()
        carried = await send.remote(num_bytes, transport)
        took = await receiver.options(_by_reference=carried.reference is not None).take.remote(carried)
        times.append(time.perf_counter() - start)
        assert took == num_bytes, f"{took} of {num_bytes} bytes came"
    return statistics.median(times[NUM_WARM_UP:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _nothing() -> None:
    """A Ray that ends by itself makes the next call fail."""
