"""Replicas that change their stage while the simulated server runs."""

from __future__ import annotations

from typing import Protocol

from serve.planning.events import Loop
from serve.planning.policies import Switching, longest_queue
from serve.planning.replicas import Replicas, SimulatedGpu

POLL_S = 0.05
"""How often a replica that leaves is asked whether its last request has ended."""


class Run(Protocol):
    """What a switch needs of the simulation."""

    loop: Loop
    replicas: Replicas

    @property
    def has_work(self) -> bool: ...

    def hand_on(self, role: str, name: str) -> None: ...


class RoleSwitch:
    """Moves one replica at a time: it stops taking work, hands on what waits, finishes what runs, and changes.

    Attributes:
        moves: When, from which stage and to which.
    """

    def __init__(self, run: Run, switching: Switching) -> None:
        self._run, self._switching = run, switching
        self._is_moving = False
        self.moves: list[tuple[float, str, str]] = []

    def start(self) -> None:
        self._run.loop.at(self._switching.period_s, self._look, None)

    def _look(self, _: object) -> None:
        if not self._run.has_work:
            return
        self._run.loop.at(self._run.loop.now + self._switching.period_s, self._look, None)
        if self._is_moving:
            return
        pools = {role: list(pool.values()) for role, pool in self._run.replicas.pools.items() if pool}
        queues = {role: sum(one.num_held for one in pool) for role, pool in pools.items()}
        spare = {role: sum(one.is_open for one in pool) for role, pool in pools.items()}
        if chosen := longest_queue(queues, spare):
            self._begin(*chosen)

    def _begin(self, source: str, target: str) -> None:
        pool = self._run.replicas.pools[source]
        name = min((name for name, one in pool.items() if one.is_open), key=lambda name: pool[name].num_held)
        self._is_moving = True
        self.moves.append((self._run.loop.now, source, target))
        gpu = self._run.replicas.close(source, name)
        self._run.hand_on(source, name)
        self._wait((source, name, target, gpu))

    def _wait(self, move: tuple[str, str, str, SimulatedGpu]) -> None:
        source, name, _, _ = move
        is_busy = self._run.replicas.pools[source][name].num_held > 0
        if is_busy:
            self._run.loop.at(self._run.loop.now + POLL_S, self._wait, move)
        else:
            self._run.loop.at(self._run.loop.now + self._switching.move_s, self._arrive, move)

    def _arrive(self, move: tuple[str, str, str, SimulatedGpu]) -> None:
        _, _, target, gpu = move
        self._run.replicas.open(target, gpu)
        self._is_moving = False
