"""The server in simulated time: the way of a request through ingress, encoders, prefill and decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from serve.deployments.affinity import Ticket
from serve.planning.accounting import Books, StageUse, check_books
from serve.planning.curves import Curves, PlanError
from serve.planning.decoder import Outputs, Sequence
from serve.planning.events import Device, Loop
from serve.planning.layout import Fleet, Layout
from serve.planning.policies import Policies, shares
from serve.planning.replicas import Replicas
from serve.planning.roles import RoleSwitch
from serve.planning.targets import Targets
from serve.planning.traffic import Column, Traffic

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to each request of a run; NaN where it was refused.

    Attributes:
        ttft_s: From arrival to the first token.
        tpot_s: Mean gap between later tokens; 0 where there is one token only.
        e2e_s: From arrival to the last token.
        duration_s: From the first arrival to the last token of all.
        stages: How busy each stage's devices were.
        num_preemptions: Of sequences that were computed again.
        moves: When a replica changed its role, from which and to which.
    """

    ttft_s: Column
    tpot_s: Column
    e2e_s: Column
    duration_s: float
    stages: tuple[StageUse, ...]
    num_preemptions: int
    num_events: int
    moves: tuple[tuple[float, str, str], ...] = ()

    @property
    def num_refused(self) -> int:
        return int(np.isnan(self.ttft_s).sum())


def simulate(layout: Layout, fleet: Fleet, traffic: Traffic, policies: Policies | None = None) -> Outcome:
    """Let the requests arrive at a server that is laid out so, and run until all are answered.

    Raises:
        PlanError: The GPUs of the layout cannot do what it asks of them.
    """
    return Simulation(layout, {name: gpu.curves for name, gpu in fleet.gpus.items()}, traffic, policies).run()


class TooManyLate(Exception):
    """More requests missed their targets than may."""


def meets(
    layout: Layout, fleet: Fleet, traffic: Traffic, policies: Policies, targets: Targets, attainment: float
) -> bool:
    """Whether so large a share of the requests meets both targets. A run that cannot any more is ended early."""
    curves = {name: gpu.curves for name, gpu in fleet.gpus.items()}
    most_late = int((1 - attainment) * len(traffic) + 1e-9)
    try:
        Simulation(layout, curves, traffic, policies, late=(targets, most_late)).run()
    except TooManyLate:
        return False
    return True


class Simulation:
    """One run.

    Args:
        late: Targets, and how many requests may miss them; the run ends with `TooManyLate` when more have.
        shared_lanes: All replicas and the front end share one device with so many lanes, as on one processor; None
            gives each GPU its own device.
    """

    def __init__(
        self,
        layout: Layout,
        curves: Mapping[str, Curves],
        traffic: Traffic,
        policies: Policies | None = None,
        *,
        shared_lanes: float | None = None,
        late: tuple[Targets, int] | None = None,
    ) -> None:
        self.layout, self.traffic, self.policies = layout, traffic, policies or Policies()
        self.loop = Loop()
        shared = None if shared_lanes is None else Device(self.loop, shared_lanes)
        prefilled = Outputs(self._prefilled, _nothing)
        decoded = Outputs(_nothing if layout.prefill else self._first_token, self._finished)
        self.replicas = Replicas(layout, curves, self.policies, self.loop, prefilled, decoded, shared)
        self._curves = self.replicas.first_curves
        engine, num_decoders = self._curves.engine, len(layout.decode)
        most = (engine.max_num_seqs + self.policies.max_waiting) * num_decoders + self.policies.max_queued
        self._max_in_flight = self.policies.max_in_flight or most
        others = (name for name in self._curves.hand_off if name != "process")
        self._transport = self.policies.transport or next(others, "")
        if self.policies.transport and self.policies.transport not in self._curves.hand_off:
            known = ", ".join(self._curves.hand_off) or "none"
            raise PlanError(f"the transport {self.policies.transport!r} is not in the curves; they have {known}")
        self._targets, self._most_late = late or (None, 0)
        self._num_late = 0
        self._columns()
        self._switch = RoleSwitch(self, self.policies.switching) if self.policies.switching else None

    def _columns(self) -> None:
        """The requests as lists, which single values are read from faster than from arrays."""
        traffic, num = self.traffic, len(self.traffic)
        self._pictures, self._patches = traffic.pictures.tolist(), traffic.patches.tolist()
        self._prompt, self._visual = traffic.prompt_tokens.tolist(), traffic.visual_tokens.tolist()
        self._output, self._arrival = traffic.output_tokens.tolist(), traffic.arrival_s.tolist()
        self._first, self._last, self._refused = [NAN] * num, [NAN] * num, [False] * num
        self._is_late = [False] * num
        self._home = [""] * num
        self._parts = [0] * num
        self._tickets: list[Ticket | None] = [None] * num
        self._num_arrived = self._num_refused = self._num_finished = self._in_flight = 0

    def run(self) -> Outcome:
        """All requests, until the last token of each."""
        if not self.replicas.encoders and any(self._pictures):
            raise PlanError("the requests have pictures, and the layout has no encoder")
        self._next_arrival(0)
        if self._switch is not None:
            self._switch.start()
        self.loop.run()
        first, last, arrival = np.array(self._first), np.array(self._last), self.traffic.arrival_s
        duration = float(np.nanmax(last)) if self._num_finished else self.loop.now
        stages = self.replicas.uses(max(duration, self.loop.now))
        check_books(self._books(first, last, stages))
        gaps = np.maximum(1, self.traffic.output_tokens - 1)
        return Outcome(
            ttft_s=first - arrival,
            tpot_s=(last - first) / gaps,
            e2e_s=last - arrival,
            duration_s=duration,
            stages=stages,
            num_preemptions=sum(one.num_preemptions for one in self.replicas.all_decoders),
            num_events=self.loop.num_events,
            moves=() if self._switch is None else tuple(self._switch.moves),
        )

    @property
    def has_work(self) -> bool:
        """Whether requests are under way or will arrive."""
        return self._in_flight > 0 or self._num_arrived < len(self._arrival)

    def _books(self, first: Column, last: Column, stages: tuple[StageUse, ...]) -> Books:
        answered, decoders = ~np.array(self._refused), self.replicas.all_decoders
        stations = [self.replicas.front, *self.replicas.encoders.values()]
        return Books(
            num_requests=len(self.traffic),
            num_arrived=self._num_arrived,
            num_refused=self._num_refused,
            num_finished=self._num_finished,
            num_in_flight=self._in_flight,
            num_answered=int(answered.sum()),
            num_first_tokens=int((~np.isnan(first)).sum()),
            num_last_tokens=int((~np.isnan(last)).sum()),
            pieces_in=sum(one.num_in for one in stations),
            pieces_out=sum(one.num_out for one in stations),
            sequences_in=sum(one.num_in for one in decoders),
            sequences_out=sum(one.num_out for one in decoders),
            output_tokens_wanted=int(self.traffic.output_tokens[answered].sum()),
            output_tokens_made=sum(one.num_tokens for one in decoders),
            prompt_tokens_wanted=int(self.traffic.prompt_tokens[answered].sum()),
            prompt_tokens_made=sum(one.num_prefilled - one.num_recomputed for one in decoders),
            gpus_of_layout=len(self.layout.gpus),
            gpus_of_run=len(self.replicas.gpus),
            devices=None if self.replicas.is_shared else len({id(gpu.device) for gpu in self.replicas.gpus}),
            stages=stages,
        )

    # ── the way of a request ──────────────────────────────────────────────────────────────────────────────────────────

    def _next_arrival(self, index: int) -> None:
        if index < len(self._arrival):
            self.loop.at(self._arrival[index], self._arrive, index)

    def _arrive(self, index: int) -> None:
        self._num_arrived += 1
        self._next_arrival(index + 1)
        kv_tokens = self._curves.engine.kv_tokens
        is_too_long = kv_tokens is not None and self._prompt[index] + self._output[index] > kv_tokens
        if self._in_flight >= self._max_in_flight or is_too_long:
            self._num_refused += 1
            self._refused[index] = True
            self._count_late()
            return
        self._in_flight += 1
        seconds = self._curves.front_end_s(self._pictures[index], self._prompt[index])
        if seconds:
            self.replicas.front.put(seconds, self._admitted, index)
        else:
            self._admitted(index)

    def _admitted(self, index: int) -> None:
        pictures, router = self._pictures[index], self.replicas.encoder_router
        if self.layout.split == "none":
            self._home[index], self._tickets[index] = self.replicas.decoder_router.decoder(str(index))
        if not pictures:
            self._to_prefill(index)
        elif self.layout.split == "none":
            self._parts[index] = 1
            self._encode(index, pictures, self.replicas.encoder_of[self._home[index]], None)
        elif self.policies.sharding and pictures > 1 and len(router.names) > 1:
            parts = shares(pictures, len(router.names))
            self._parts[index] = len(parts)
            for part in parts:
                self._encode(index, part, *router.least_loaded(part))
        else:
            self._parts[index] = 1
            self._encode(index, pictures, *router.encoder(str(index), pictures))

    def _encode(self, index: int, pictures: int, name: str, ticket: Ticket | None) -> None:
        encoder = self.replicas.encoders[name]
        seconds = encoder.seconds(self._patches[index] / self._pictures[index], pictures)
        encoder.put(seconds, self._encoded, (index, pictures, ticket))

    def _encoded(self, part: tuple[int, int, Ticket | None]) -> None:
        index, pictures, ticket = part
        self.replicas.encoder_router.done(ticket)
        num_bytes = self._curves.visual_token_bytes * self._visual[index] * pictures / self._pictures[index]
        is_local = self.layout.split in ("none", "pd")
        self._move("process" if is_local else self._transport, num_bytes, self._part_arrived, index)

    def _move(self, transport: str, num_bytes: float, arrived: Callable[[int], None], index: int) -> None:
        """Hand data on. It takes time, but no GPU's."""
        self.loop.at(self.loop.now + self._curves.hand_off_s(transport, num_bytes), arrived, index)

    def _part_arrived(self, index: int) -> None:
        self._parts[index] -= 1
        if not self._parts[index]:
            self._to_prefill(index)

    def _to_prefill(self, index: int) -> None:
        """The prompt goes to a prefill replica, or to a decoder where there are none."""
        if self.layout.split == "none":
            home = self.replicas.decoders[self._home[index]]
            home.put(Sequence(index, self._prompt[index], self._output[index]))
        elif self.replicas.prefills:
            self._put("prefill", Sequence(index, self._prompt[index], 1))
        else:
            self._put("decode", Sequence(index, self._prompt[index], self._output[index]))

    def _put(self, role: str, seq: Sequence) -> None:
        replicas = self.replicas
        router, pool = (
            (replicas.prefill_router, replicas.prefills)
            if role == "prefill"
            else (replicas.decoder_router, replicas.decoders)
        )
        name, self._tickets[seq.index] = router.decoder(str(seq.index))
        pool[name].put(seq)

    def _prefilled(self, seq: Sequence) -> None:
        """The first token came from a prefill replica; the rest comes from a decoder."""
        index = seq.index
        if self._first[index] == self._first[index]:
            return  # it was there before a preemption
        self._set_first(index)
        self.replicas.prefill_router.done(self._tickets[index])
        if self._output[index] == 1:
            self._end(index)
        else:
            self._move(self._transport, self._curves.kv_token_bytes * seq.num_tokens, self._to_decode, index)

    def _to_decode(self, index: int) -> None:
        self._put("decode", Sequence(index, self._prompt[index], self._output[index] - 1, prefilled=True))

    def _first_token(self, seq: Sequence) -> None:
        if self._first[seq.index] != self._first[seq.index]:  # after a preemption it is not the first any more
            self._set_first(seq.index)

    def _set_first(self, index: int) -> None:
        self._first[index] = self.loop.now
        if self._targets is not None and self.loop.now - self._arrival[index] > self._targets.ttft_s:
            self._is_late[index] = True
            self._count_late()

    def _count_late(self) -> None:
        self._num_late += 1
        if self._targets is not None and self._num_late > self._most_late:
            raise TooManyLate

    def _finished(self, seq: Sequence) -> None:
        self.replicas.decoder_router.done(self._tickets[seq.index])
        self._end(seq.index)

    def _end(self, index: int) -> None:
        self._last[index] = now = self.loop.now
        if self._targets is not None and not self._is_late[index]:
            gap = (now - self._first[index]) / max(1, self._output[index] - 1)
            if gap > self._targets.tpot_s:
                self._count_late()
        self._num_finished += 1
        self._in_flight -= 1

    def hand_on(self, role: str, name: str) -> None:
        """What waits at a replica that is closed goes to its siblings."""
        replicas = self.replicas
        if role == "encode":
            for work, done, (index, pictures, ticket) in replicas.encoders[name].take_waiting():
                replicas.encoder_router.done(ticket)
                other, ticket = replicas.encoder_router.least_loaded(pictures)
                replicas.encoders[other].put(work, done, (index, pictures, ticket))
            return
        router = replicas.prefill_router if role == "prefill" else replicas.decoder_router
        pool = replicas.prefills if role == "prefill" else replicas.decoders
        for seq in pool[name].take_waiting():
            router.done(self._tickets[seq.index])
            self._put(role, seq)


def _nothing(_: Sequence) -> None:
    pass
