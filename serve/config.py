"""Settings of a server: the same object for in-process serving, for Ray and for tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from mm.config import MiB, ModelConfig
from mm.errors import InvalidOption


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served.

    Attributes:
        model: What is loaded, and the bounds of its media.
        served_model_names: Names that requests may use, the preferred one first; empty means the model's own name, of a
            folder its last part.
        host, port: Where HTTP is bound.
        num_ingress, num_encoders, num_decoders: Replicas on Ray.
        max_decoders: Ray starts up to so many decoders while requests fill those that run, and ends them again down to
            `num_decoders`; None keeps that number.
        ingress_cpus, encoder_cpus, decoder_cpus: Share of the cluster's CPUs that a replica reserves. For placement
            only: how many threads torch uses is `model.num_threads`.
        encoder_gpus, decoder_gpus: GPUs, or fractions of one, per replica.
        encode_workers: Requests whose media one encoder works on at a time.
        max_queued_requests: Requests that an ingress holds beyond those that decoders may hold; more are refused.
        api_keys: Keys that callers have to send; empty lets everyone in.
        max_body_bytes: Size of a request body, enforced while it streams in.
        max_choices: Upper bound of `n`.
        request_timeout_s: From arrival to the last token.
        send_timeout_s: A client that takes nothing for so long is cut off.
        drain_timeout_s: How long running requests may go on after a stop was asked for.
        ray_cpus: CPUs that a Ray started here believes in; None takes what is there, or what the replicas need.
        object_store_bytes: Shared memory for features on their way.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    num_ingress: int = 1
    num_encoders: int = 1
    num_decoders: int = 1
    max_decoders: int | None = None
    ingress_cpus: float = 0.1
    encoder_cpus: float = 0.5
    decoder_cpus: float = 0.5
    encoder_gpus: float = 0.0
    decoder_gpus: float = 0.0
    encode_workers: int = 2
    max_queued_requests: int = 64
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 32 * MiB
    max_choices: int = 8
    request_timeout_s: float = 300.0
    send_timeout_s: float = 60.0
    drain_timeout_s: float = 20.0
    ray_cpus: float | None = None
    object_store_bytes: int = 256 * MiB

    def __post_init__(self) -> None:
        at_least_one = (
            "num_ingress",
            "num_encoders",
            "num_decoders",
            "encode_workers",
            "max_choices",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InvalidOption("serve", name, f"was {getattr(self, name)}; it has to be at least 1")
        if self.max_decoders is not None and self.max_decoders < self.num_decoders:
            least = f"it has to be at least num_decoders, {self.num_decoders}"
            raise InvalidOption("serve", "max_decoders", f"was {self.max_decoders}; {least}")
        if any(not key for key in self.api_keys):
            raise InvalidOption("serve", "api_keys", "holds an empty key")

    @property
    def names(self) -> tuple[str, ...]:
        """Every name the model answers to, the preferred one first. A local folder answers to its last part."""
        given = self.model.model
        return self.served_model_names or (Path(given).resolve().name if Path(given).is_dir() else given,)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that one decoder replica holds, running or waiting their turn."""
        return self.model.max_num_seqs + self.model.max_waiting

    @property
    def max_in_flight(self) -> int:
        """Requests that one ingress admits at a time."""
        return self.max_ongoing_requests * (self.max_decoders or self.num_decoders) + self.max_queued_requests

    @property
    def total_cpus(self) -> float:
        """CPUs that all replicas reserve together."""
        return (
            self.num_ingress * self.ingress_cpus
            + self.num_encoders * self.encoder_cpus
            + (self.max_decoders or self.num_decoders) * self.decoder_cpus
        )

    def with_threads(self) -> ServeConfig:
        """The same with torch's thread count spelled out.

        Ray gives each replica another default (OMP_NUM_THREADS) than a plain process has, and the count decides the
        speed and the last bits of a sum.
        """
        if self.model.num_threads is not None:
            return self
        return replace(self, model=replace(self.model, num_threads=len(os.sched_getaffinity(0))))
