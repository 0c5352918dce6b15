"""Which replica takes a call: the one that it names, see `serve.deployments.affinity`; others one with room.

Of two at random, one with room in its cache comes before one whose line has begun.

Ray counts the requests that a replica holds; a decoder knows more: how full its cache is, and how many prompt tokens
wait. It publishes that about once a second, so it orders candidates only where it makes a plain difference; among
equals Ray's own count decides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from mm.engine.stats import EngineStats
from serve.deployments import affinity, availability
from serve.deployments.affinity import is_full, order_of

STATS_PERIOD_S = 1.0


def routing_stats(stats: EngineStats, holds: Mapping[str, int]) -> dict[str, Any]:
    """What a decoder's replica publishes.

    Args:
        holds: Tokens of the beginnings of prompts that its prefix cache holds, by their hash.
    """
    return {
        "kv_usage": stats.kv_usage,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_waiting_tokens": stats.num_waiting_tokens,
        "holds": dict(holds),
    }


class LeastLoadedRouter(FIFOMixin, RequestRouter):
    """Two choices, those with room first. It tells the deployment's `Stage` how many replicas there are.

    Encoders publish no figures, so among them Ray's count alone decides. Ray copies this class into the ingress, so it
    reaches what it shares with the rest of the process through a module, which is not copied.
    """

    _deployment = ""

    def initialize_state(self, **kwargs: str) -> None:
        self._deployment = kwargs.get("deployment", "")

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray's controller sent the replicas that run."""
        super().update_replicas(replicas)
        self._report()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found the replica dead, before the controller did."""
        super().on_replica_actor_died(replica_id)
        self._report()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """The replica has taken the request."""
        if call := availability.CURRENT_CALL.get(None):
            call.accepted_by(replica_id.unique_id)

    def _report(self) -> None:
        if stage := availability.STAGES.get(self._deployment):
            stage.report(len(self.curr_replicas))
        if balancer := affinity.BALANCERS.get(self._deployment):
            replicas = self.curr_replicas.values()
            balancer.update({one.replica_id.unique_id: one.routing_stats for one in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates; within a rank Ray takes the one with the shortest queue.

        A call that names replicas goes to the first of them that takes it.
        """
        if pending_request is not None and (order := order_of(pending_request.metadata.session_id)):
            by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            named = [[by_name.pop(name)] for name in order if name in by_name]
            return [*named, list(by_name.values())] if by_name else named
        with_room = [replica for replica in candidate_replicas if not is_full(replica.routing_stats)]
        full = [replica for replica in candidate_replicas if is_full(replica.routing_stats)]
        full.sort(key=lambda replica: replica.routing_stats.get("num_waiting_tokens", 0))
        ranks = [random.sample(with_room, min(2, len(with_room))), full[:2]]
        return [rank for rank in ranks if rank]
