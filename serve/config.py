"""Settings of a server: the same object for in-process serving, for Ray and for tests.

Each setting is declared here once; see `mm.settings`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mm.config import MiB, ModelConfig
from mm.errors import InvalidOption
from mm.settings import check_settings, setting

HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*)")
ADDRESS = re.compile(r"auto|(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):[0-9]{1,5}")
NAME = re.compile(r"[A-Za-z0-9._-]+")
PREFIX = re.compile(r"[A-Za-z0-9._-]*")
ROUTE = re.compile(r"/|(/[A-Za-z0-9._~-]+)+")
LABEL = re.compile(r"[^=\s]+=\S+")
Split = Literal["none", "ep", "epd"]
KVTransport = Literal["auto", "inline", "object_store"]
ORIGIN = re.compile(r"\*|https?://[^/@\s]+/?")


def check_hosts(owner: str, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
    """Refuse what is no name, and what is no origin of web pages.

    Raises:
        InvalidOption: Names it.
    """
    for host in hosts:
        if not HOST_NAME.fullmatch(host):
            raise InvalidOption(owner, "allowed_hosts", f"holds {host!r}; give a name without scheme and port, or *")
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise InvalidOption(owner, "allowed_origins", f"holds {origin!r}; write it as https://example.org")


STAGES: dict[Split, tuple[str, ...]] = {
    "none": ("decoder",),
    "ep": ("encoder", "decoder"),
    "epd": ("encoder", "prefill", "decoder"),
}
"""The stages that have replicas. Where the encoder is not apart, each decoder has one."""


def check_split(config: ServeConfig) -> None:
    """Refuse settings of stages that have no replicas of their own. Whoever builds an application has to call this.

    Raises:
        InvalidOption: Names the setting.
    """
    apart, model = STAGES[config.split], config.model
    for name, given, is_on in (
        ("engine", model.engine, model.engine != "native"),
        ("tensor_parallel", model.tensor_parallel, model.tensor_parallel > 1),
    ):
        if config.split == "epd" and is_on:
            what = f"was {given!r}, whose keys and values cannot move to another replica; say split=ep, or leave it out"
            raise InvalidOption("model", name, what)
    for stage in ("encoder", "prefill"):
        mine = (f"num_{stage}s", f"max_{stage}s_per_node", *(f"{stage}_{name}" for name in PLACED))
        for one in dataclasses.fields(config):
            is_idle = one.name in mine or (one.name == "kv_transport" and stage == "prefill")
            if stage not in apart and is_idle and getattr(config, one.name) != one.default:
                means = "every decoder has its encoder" if config.split == "none" else "decoders compute the prompts"
                what = f"has no meaning with split={config.split}, where {means}; leave it out, or split more"
                raise InvalidOption("serve", one.name, what)


PLACED = ("cpus", "gpus", "accelerator_type", "labels")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served.

    Attributes:
        model: Which model is loaded, and the bounds of its media.
        served_model_names: Names that requests may use, the preferred one first. Empty means the model's own name; of a
            folder its last part.
        split: With "none" each decoder has the encoder too. With "epd" prefill replicas compute the prompts, whose keys
            and values then move to decoders.
        max_decoders: Ray starts up to this many decoders while requests fill the running ones, and stops them again
            down to `num_decoders`; None keeps that number.
        ingress_cpus, encoder_cpus, prefill_cpus, decoder_cpus: For placement only. How many threads torch uses is
            `model.num_threads`.
        encoder_gpus, prefill_gpus, decoder_gpus: None asks for a share where `model.device` is, or becomes, a GPU. A KV
            cache takes no more than its replica's share.
        address: None starts a Ray on this machine, which ends with the server.
        app_name, route_prefix, deployment_prefix: With names of its own, an application runs beside others.
        max_queued_requests: Beyond those that the decoders may hold.
        api_keys: Empty lets every client in.
        ray_cpus: None takes what the machine has, or what the replicas need.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    host: str = setting("127.0.0.1", help="Address to listen on.")
    port: int = setting(8000, min=0, max=65535, help="Port to listen on.")
    served_model_names: tuple[str, ...] = setting(
        (), cli="served_model_name", help="Name of the model in the API; repeat for aliases."
    )
    api_keys: tuple[str, ...] = setting(
        (), cli="api_key", secret=True, help="Key that clients have to send; repeat for several."
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), cli="allow_host", help="Name by which clients may reach the server, beside addresses; repeat; * for all."
    )
    allowed_origins: tuple[str, ...] = setting(
        (), cli="allow_origin", help="Web pages that may use the server, such as https://example.org; repeat."
    )
    split: Split = setting(
        "ep",
        ray_only=True,
        help="Which stages have replicas of their own: none (each replica has all), ep (the encoder apart), epd (and "
        "prefill apart from decode) (Ray).",
    )
    num_encoders: int = setting(1, min=1, cli="encoders", ray_only=True, help="Encoder replicas (Ray).")
    num_prefills: int = setting(
        1, min=1, cli="prefills", ray_only=True, help="Prefill replicas, with --split epd (Ray)."
    )
    num_decoders: int = setting(1, min=1, cli="decoders", ray_only=True, help="Decoder replicas (Ray).")
    max_decoders: int | None = setting(
        None, min=1, ray_only=True, help="Start up to this many decoders while requests fill the running ones (Ray)."
    )
    num_ingress: int = setting(1, min=1, cli="ingresses", ray_only=True, help="HTTP replicas (Ray).")
    ingress_cpus: float = setting(0.1, min=0, ray_only=True, help="CPUs that one HTTP replica reserves (Ray).")
    encoder_cpus: float = setting(0.5, min=0, ray_only=True, help="CPUs that one encoder reserves (Ray).")
    prefill_cpus: float = setting(0.5, min=0, ray_only=True, help="CPUs that one prefill replica reserves (Ray).")
    decoder_cpus: float = setting(0.5, min=0, ray_only=True, help="CPUs that one decoder reserves (Ray).")
    encoder_gpus: float | None = setting(
        None, min=0, ray_only=True, help="GPUs, or a fraction of one, per encoder; 0.25 on a GPU when not given (Ray)."
    )
    prefill_gpus: float | None = setting(
        None, min=0, ray_only=True, help="GPUs, or a fraction, per prefill replica; 0.375 on a GPU if not given (Ray)."
    )
    decoder_gpus: float | None = setting(
        None,
        min=0,
        ray_only=True,
        help="GPUs, or a fraction of one, per decoder; when not given what other stages leave of a GPU (Ray).",
    )
    encoder_accelerator_type: str | None = setting(
        None, ray_only=True, help="Kind of GPU that encoders run on, as Ray names it, such as T4 or H100 (Ray)."
    )
    prefill_accelerator_type: str | None = setting(
        None, ray_only=True, help="Kind of GPU that prefill runs on, as Ray names it, such as T4 or H100 (Ray)."
    )
    decoder_accelerator_type: str | None = setting(
        None, ray_only=True, help="Kind of GPU that decoders run on, as Ray names it, such as T4 or H100 (Ray)."
    )
    encoder_labels: tuple[str, ...] = setting(
        (), cli="encoder_label", ray_only=True, help="Label KEY=VALUE of the nodes that encoders run on; repeat (Ray)."
    )
    prefill_labels: tuple[str, ...] = setting(
        (), cli="prefill_label", ray_only=True, help="Label KEY=VALUE of the nodes that prefill runs on; repeat (Ray)."
    )
    decoder_labels: tuple[str, ...] = setting(
        (), cli="decoder_label", ray_only=True, help="Label KEY=VALUE of the nodes that decoders run on; repeat (Ray)."
    )
    max_encoders_per_node: int | None = setting(
        None, min=1, max=100, ray_only=True, help="Encoders that one node holds at most (Ray)."
    )
    max_prefills_per_node: int | None = setting(
        None, min=1, max=100, ray_only=True, help="Prefill replicas that one node holds at most (Ray)."
    )
    max_decoders_per_node: int | None = setting(
        None, min=1, max=100, ray_only=True, help="Decoders that one node holds at most (Ray)."
    )
    kv_transport: KVTransport = setting(
        "auto",
        ray_only=True,
        help="How keys and values get from prefill to decode: inline, object_store (shared memory on one node), or "
        "auto, which sends small ones inline (Ray).",
    )
    address: str | None = setting(
        None, ray_only=True, help="Deploy to a Ray cluster that runs: auto, or HOST:PORT. Else Ray is started here."
    )
    app_name: str = setting("mm", ray_only=True, help="Name of the application on the cluster (Ray).")
    route_prefix: str = setting("/", ray_only=True, help="Path below which the API is served, such as /tiny (Ray).")
    deployment_prefix: str = setting(
        "", ray_only=True, help="Put before the names of the deployments, such as Encoder and Decoder (Ray)."
    )
    ray_cpus: float | None = setting(None, min=0, ray_only=True, help="CPUs that the Ray started here may use.")
    object_store_bytes: int = setting(
        256 * MiB, min=0, ray_only=True, help="Shared memory for encoded media between replicas, in bytes (Ray)."
    )
    encode_workers: int = setting(2, min=1, help="Requests whose media one encoder works on at the same time.")
    max_queued_requests: int = setting(64, min=0, help="Requests that one HTTP replica holds back; more are refused.")
    max_body_bytes: int = setting(32 * MiB, min=0, help="Size of a request body, in bytes.")
    body_timeout_s: float = setting(300.0, above=0, help="Seconds that a request body may take to arrive.")
    min_body_bytes_per_s: float = setting(
        1000.0, above=0, help="Slowest speed of a request body, in bytes per second, after its first 10 seconds."
    )
    max_arriving_per_address: int = setting(
        128, min=1, help="Bodies that one address may send at a time. Of more the slowest is refused."
    )
    max_arriving_bytes: int = setting(256 * MiB, min=0, help="Memory of all bodies that are arriving, in bytes.")
    header_timeout_s: float = setting(20.0, above=0, help="Seconds that a request's header may take (--in-process).")
    ui: bool = setting(False, help="Serve the demo page at /ui, beside the API.")
    batch_dir: str | None = setting(
        None, help="Folder of /v1/files and /v1/batches; without it they are off. Batches go on after a restart."
    )
    record_trace: str | None = setting(
        None, help="File to which a line per answered request is added, for mm plan: time and sizes, no contents."
    )
    max_batch_file_bytes: int = setting(512 * MiB, min=0, help="Size of an uploaded file, in bytes.")
    max_choices: int = setting(8, min=1, help="Largest `n` that a request may ask for.")
    request_timeout_s: float = setting(300.0, min=0, help="Seconds from a request's body to its last token.")
    send_timeout_s: float = setting(60.0, min=0, help="Seconds after which a client that reads nothing is cut off.")
    drain_timeout_s: float = setting(20.0, min=0, help="Seconds that running requests get to finish after a stop.")

    def __post_init__(self) -> None:
        check_settings(self, "serve")
        if self.max_decoders is not None and self.max_decoders < self.num_decoders:
            least = f"it has to be at least num_decoders, {self.num_decoders}"
            raise InvalidOption("serve", "max_decoders", f"was {self.max_decoders}; {least}")
        check_hosts("serve", self.allowed_hosts, self.allowed_origins)
        if any(not key for key in self.api_keys):
            raise InvalidOption("serve", "api_keys", "holds an empty key")
        if self.ui and self.api_keys:
            what = "cannot go with API keys, since whoever opens the page could use the server; run `mm demo --url URL`"
            raise InvalidOption("serve", "ui", what)
        if self.batch_dir is not None and self.num_ingress > 1:
            raise InvalidOption("serve", "batch_dir", "needs a single HTTP replica, which works on the batches")
        if self.record_trace is not None and self.num_ingress > 1:
            raise InvalidOption("serve", "record_trace", "needs a single HTTP replica, which writes the file")
        if self.ui and self.num_ingress > 1:
            raise InvalidOption("serve", "ui", "needs a single HTTP replica, which holds the visitors of the page")
        self._check_cluster()

    def _check_cluster(self) -> None:
        """Refuse names, labels and shares that Ray would refuse later, in a replica's log.

        Raises:
            InvalidOption: Names the setting.
        """
        for name, pattern, allowed in (
            ("address", ADDRESS, "auto, or HOST:PORT of the cluster's GCS such as 10.0.0.4:6379"),
            ("app_name", NAME, "letters, digits, ., _ and -"),
            ("deployment_prefix", PREFIX, "letters, digits, ., _ and -"),
            ("route_prefix", ROUTE, "a path such as /tiny that begins with / and does not end with it"),
        ):
            given = getattr(self, name)
            if given is not None and not pattern.fullmatch(given):
                raise InvalidOption("serve", name, f"was {given!r}; it has to be {allowed}")
        for name in ("encoder_labels", "prefill_labels", "decoder_labels"):
            if wrong := next((label for label in getattr(self, name) if not LABEL.fullmatch(label)), None):
                raise InvalidOption("serve", name, f"holds {wrong!r}; write it as KEY=VALUE")
        for name in ("encoder_gpus", "prefill_gpus", "decoder_gpus"):
            share = getattr(self, name)
            if share is not None and share > 1 and share != int(share):
                raise InvalidOption("serve", name, f"was {share}; above 1 it has to be a whole number")
        if self.address is not None and self.ray_cpus is not None:
            raise InvalidOption("serve", "ray_cpus", "belongs to a Ray that is started here; leave it or address out")

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may use for the model, the preferred one first. A local folder gives its last part."""
        given = self.model.model
        return self.served_model_names or (Path(given).resolve().name if Path(given).is_dir() else given,)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that one decoder replica holds, running or waiting."""
        return self.model.max_num_seqs + self.model.max_waiting

    @property
    def max_in_flight(self) -> int:
        """Requests that one ingress admits at a time."""
        return self.max_ongoing_requests * (self.max_decoders or self.num_decoders) + self.max_queued_requests

    @property
    def total_cpus(self) -> float:
        """CPUs that all replicas reserve together."""
        counts = {"encoder": self.num_encoders, "prefill": self.num_prefills}
        counts["decoder"] = self.max_decoders or self.num_decoders
        stages = sum(counts[stage] * getattr(self, f"{stage}_cpus") for stage in STAGES[self.split])
        return self.num_ingress * self.ingress_cpus + stages

    def with_threads(self) -> ServeConfig:
        """The same configuration with torch's thread count filled in.

        Ray gives each replica another default (OMP_NUM_THREADS) than a plain process has, and the count decides the
        speed and the last bits of a sum.
        """
        if self.model.num_threads is not None:
            return self
        num_threads = max(1, len(os.sched_getaffinity(0)) // self.model.tensor_parallel)
        return replace(self, model=replace(self.model, num_threads=num_threads))
