"""The replicas of one deployment as an ingress reaches them."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from serve.deployments.affinity import BALANCERS, Balancer, Ticket
from serve.deployments.availability import STAGES, Pulse, Stage
from serve.deployments.calls import ping

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Tier:
    """The replicas of one deployment.

    Attributes:
        stage: Whether there are any.
        balancer: Which of them should take a call.
        pulse: Whether they answer.
    """

    handle: DeploymentHandle
    stage: Stage
    balancer: Balancer
    pulse: Pulse

    @classmethod
    def of(cls, handle: DeploymentHandle, name: str) -> Tier:
        """A deployment by its handle; its router will report to the tier.

        Args:
            name: What clients read.
        """
        tier = cls(handle, Stage(name), Balancer(), Pulse(partial(ping, handle.options(_by_reference=True))))
        STAGES[handle.deployment_name], BALANCERS[handle.deployment_name] = tier.stage, tier.balancer
        return tier

    def for_references(self, has_references: bool) -> DeploymentHandle:
        """The handle for messages with or without references: they are only counted on calls that go through Ray."""
        return self.handle.options(_by_reference=True) if has_references else self.handle

    async def work(self, call: Coroutine[Any, Any, T], is_new: bool, ticket: Ticket | None) -> T:
        """The result of a call to a replica.

        Args:
            is_new: Whether no replica has worked on the request.
            ticket: Its load, which moves to the replica that takes the call.
        """
        on_routed = None if ticket is None else partial(self.balancer.move, ticket)
        return await self.stage.through(call, is_new=is_new, on_routed=on_routed)
