"""The replicas of a simulated server: which GPU each is on, and who routes to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from serve.deployments.affinity import Ticket
from serve.planning.accounting import StageUse
from serve.planning.curves import Curves, PlanError
from serve.planning.decoder import Decoder, Outputs
from serve.planning.events import Device, Loop, Station
from serve.planning.layout import Layout
from serve.planning.policies import Policies, Router


@dataclass(frozen=True)
class SimulatedGpu:
    """A GPU, and the stage that it counts for."""

    kind: str
    role: str
    device: Device


class Encoder(Station[tuple[int, int, Ticket | None]]):
    """An encoder replica: a queue in front of a GPU, and how long its pictures take."""

    def __init__(self, gpu: SimulatedGpu, curves: Curves, workers: int) -> None:
        super().__init__(gpu.device, workers)
        if curves.encode is None:
            raise PlanError(f"GPUs of kind {gpu.kind} have no encode curve, so they hold no encoder")
        self.gpu = gpu
        self.seconds: Callable[[float, float], float] = lru_cache(maxsize=100_000)(curves.encode)


ROLES = {
    "none": ("encode", "prefill", "colocated"),
    "ep": ("encode", "prefill", "prefill+decode"),
    "pd": ("encode", "encode+prefill", "decode"),
    "epd": ("encode", "prefill", "decode"),
}
"""What the GPUs of a layout's three parts are called, by split."""


class Replicas:
    """All replicas of a layout.

    Args:
        prefilled, decoded: Told about tokens by replicas that prefill only, and by decoders.
        shared: A device that all of them and the front end run on, for a server on one processor; None gives each GPU
            its own.

    Attributes:
        encoder_of: The encoder of each decoder, where both are one replica.
    """

    def __init__(
        self,
        layout: Layout,
        curves: Mapping[str, Curves],
        policies: Policies,
        loop: Loop,
        prefilled: Outputs,
        decoded: Outputs,
        shared: Device | None,
    ) -> None:
        self._curves, self._policies, self._loop, self._shared = curves, policies, loop, shared
        self._outputs = {"prefill": prefilled, "decode": decoded}
        self._numbers = itertools.count()
        self.encoders: dict[str, Encoder] = {}
        self.prefills: dict[str, Decoder] = {}
        self.decoders: dict[str, Decoder] = {}
        self.gpus: list[SimulatedGpu] = []
        self.encoder_of: dict[str, str] = {}
        self._gpu_of: dict[str, SimulatedGpu] = {}
        self.is_shared = shared is not None
        self.encoder_router = Router(policies.routing, partial(_open, self.encoders), loop)
        self.prefill_router = Router(policies.routing, partial(_said, self.prefills), loop)
        self.decoder_router = Router(policies.routing, partial(_said, self.decoders), loop)
        self._place(layout)
        self.first_curves = curves[(*layout.decode, *layout.prefill)[0]]
        workers = self.first_curves.front_end_workers * policies.num_ingress
        self._front_device = shared or Device(loop, workers)
        self.front: Station[int] = Station(self._front_device, workers)

    def _place(self, layout: Layout) -> None:
        encode, prefill, decode = ROLES[layout.split]
        for kind in layout.encode:
            self.open("encode", self._gpu(kind, encode))
        for kind in layout.prefill:
            gpu = self._gpu(kind, prefill)
            self.open("prefill", gpu)
            if layout.split == "pd":
                self.open("encode", gpu)
        for kind in layout.decode:
            gpu = self._gpu(kind, decode)
            name = self.open("decode", gpu)
            if layout.split == "none" and self._curves[kind].encode is not None:
                self.encoder_of[name] = self.open("encode", gpu)

    def _gpu(self, kind: str, role: str) -> SimulatedGpu:
        gpu = SimulatedGpu(kind, role, self._shared or Device(self._loop, self._curves[kind].lanes))
        self.gpus.append(gpu)
        return gpu

    def open(self, role: str, gpu: SimulatedGpu) -> str:
        """Start a replica on a GPU. Returns its name.

        Raises:
            PlanError: The GPU has no curves for it.
        """
        name, curves = f"{role}-{next(self._numbers)}", self._curves[gpu.kind]
        self._gpu_of[name] = gpu
        if role == "encode":
            self.encoders[name] = Encoder(gpu, curves, self._policies.encode_workers)
            self.encoder_router.refresh()
            return name
        if not curves.decodes:
            raise PlanError(f"GPUs of kind {gpu.kind} have no curves of prefill and decode, so they can only encode")
        if curves.engine.max_num_seqs > curves.engine.max_batch_tokens:
            raise PlanError("engine.max_num_seqs exceeds engine.max_batch_tokens of the curves, which is not simulated")
        pool, router = self._decoder_pool(role)
        pool[name] = Decoder(gpu.device, curves, self._outputs[role])
        router.refresh()
        return name

    def close(self, role: str, name: str) -> SimulatedGpu:
        """Route nothing more to a replica. Returns its GPU; what runs there goes on."""
        if role == "encode":
            self.encoders[name].is_open = False
            self.encoder_router.refresh()
        else:
            pool, router = self._decoder_pool(role)
            pool[name].is_open = False
            router.refresh()
        return self._gpu_of[name]

    def _decoder_pool(self, role: str) -> tuple[dict[str, Decoder], Router]:
        if role == "prefill":
            return self.prefills, self.prefill_router
        return self.decoders, self.decoder_router

    @property
    def pools(self) -> dict[str, Mapping[str, Encoder | Decoder]]:
        """The replicas by role."""
        return {"encode": self.encoders, "prefill": self.prefills, "decode": self.decoders}

    @property
    def all_decoders(self) -> list[Decoder]:
        """Those that prefill only, too."""
        return [*self.prefills.values(), *self.decoders.values()]

    def uses(self, duration_s: float) -> tuple[StageUse, ...]:
        """How busy the front end and each stage's GPUs were. A GPU counts for the stage that it began with."""
        found = dict[tuple[str, str], list[Device]]()
        for gpu in self.gpus:
            found.setdefault((gpu.role, gpu.kind), []).append(gpu.device)
        front = StageUse.of("front end", "", [self._front_device], duration_s)
        return (front, *(StageUse.of(*stage, group, duration_s) for stage, group in found.items()))


def _open(encoders: Mapping[str, Encoder]) -> dict[str, dict[str, float]]:
    return {name: {} for name, one in encoders.items() if one.is_open}


def _said(decoders: Mapping[str, Decoder]) -> dict[str, dict[str, float]]:
    return {name: decoder.said for name, decoder in decoders.items() if decoder.is_open}
