"""What the simulated server decides: which replica takes a request, how pictures are shared out, and who switches role.

Routing is the server's own: `serve.deployments.affinity.Balancer`, told once a second what the decoders publish.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from serve.deployments.affinity import Balancer, Ticket
from serve.planning.events import Loop

PERIOD_S = 1.0
"""How often replicas publish, as `serve.deployments.router.STATS_PERIOD_S`."""
Routing = Literal["server", "round_robin"]


@dataclass(frozen=True, kw_only=True)
class Switching:
    """Replicas change their stage when queues are uneven (section 3.2.4 of the EPD paper, arXiv:2501.05460).

    The stage with the longest queue gets a replica of the one with the most to spare, unless every queue is at least
    half as long.

    Attributes:
        period_s: Between two decisions.
        move_s: While a replica changes it does nothing.
    """

    period_s: float = 5.0
    move_s: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Policies:
    """How the simulated server behaves; the defaults are those of `mm serve`.

    Attributes:
        routing: The server's own, or each replica in turn.
        sharding: Whether the pictures of one request are shared out among encoders.
        encode_workers: Requests that one encoder computes at a time.
        num_ingress: Front ends.
        transport: Of visual tokens and of KV between GPUs, as the curves name it; None takes the first that they have.
        max_in_flight: Requests beyond it are refused; None follows the server's settings.
        max_waiting, max_queued: Settings that `max_in_flight` follows from.
        switching: Whether replicas change roles. No replica of `mm serve` does.
    """

    routing: Routing = "server"
    sharding: bool = False
    encode_workers: int = 2
    num_ingress: int = 1
    transport: str | None = None
    max_in_flight: int | None = None
    max_waiting: int = 256
    max_queued: int = 64
    switching: Switching | None = None


class Replica(Protocol):
    """What a router needs of a stage's replica."""

    is_open: bool


class Router:
    """Chooses among the replicas of one stage.

    Args:
        publishes: What the replicas say of themselves, by name.
        loop: Whose time it is.
    """

    def __init__(
        self, routing: Routing, publishes: Callable[[], Mapping[str, Mapping[str, float]]], loop: Loop
    ) -> None:
        self._publishes, self._loop = publishes, loop
        self.balancer = Balancer() if routing == "server" else None
        self._turn = itertools.count()
        self.names: list[str] = []
        self._due = 0.0
        self.refresh()

    def refresh(self) -> None:
        """The replicas changed."""
        said = self._publishes()
        self.names = list(said)
        if self.balancer is not None:
            self.balancer.update(said)

    def _look(self) -> None:
        if self._loop.now >= self._due:
            self._due = self._loop.now + PERIOD_S
            self.refresh()

    def encoder(self, key: str, load: float) -> tuple[str, Ticket | None]:
        """The encoder for a request, and what counts its load until `done`."""
        if self.balancer is None:
            return self.names[next(self._turn) % len(self.names)], None
        name = self.balancer.encoders(key, load)[0]
        return name, self.balancer.take(name, self.balancer.load_at(name, key, load))

    def least_loaded(self, load: float) -> tuple[str, Ticket | None]:
        """The encoder with the least load, for a part of a request."""
        if self.balancer is None:
            return self.encoder("", load)
        name = min(self.names, key=self.balancer.load)
        return name, self.balancer.take(name, load)

    def decoder(self, key: str) -> tuple[str, Ticket | None]:
        """The decoder for a request."""
        if self.balancer is None:
            return self.names[next(self._turn) % len(self.names)], None
        self._look()
        name = self.balancer.decoders((key,))[0]
        return name, self.balancer.take(name, 1.0)

    def done(self, ticket: Ticket | None) -> None:
        if ticket is not None and self.balancer is not None:
            self.balancer.done(ticket)


def longest_queue(queues: Mapping[str, int], spare: Mapping[str, int]) -> tuple[str, str] | None:
    """From which stage to which a replica should go; None leaves all where they are.

    Args:
        queues: Requests that wait, by stage.
        spare: Replicas, by stage; one always stays.
    """
    target = max(queues, key=lambda stage: queues[stage])
    if all(2 * length >= queues[target] for length in queues.values()):
        return None
    sources = [stage for stage in queues if spare[stage] > 1 and queues[stage] < queues[target]]
    return (max(sources, key=lambda stage: spare[stage]), target) if sources else None


def shares(num_pictures: int, num_encoders: int) -> Sequence[int]:
    """How many pictures each part of a request has, when it is shared out evenly."""
    parts = min(num_pictures, num_encoders)
    return [num_pictures // parts + (i < num_pictures % parts) for i in range(parts)]
