"""What the replicas of an application ask of a Ray cluster, and whether its nodes could ever give it.

Ray waits for ever for resources that no node has. So they are compared with what the nodes have before anything is
deployed, and what is missing is said in one line. Nothing here imports Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm.errors import InvalidOption, MmError
from serve.config import STAGES, ServeConfig, Split, check_split

SHARES: dict[Split, dict[str, float]] = {
    "none": {"decoder": 1.0},
    "ep": {"encoder": 0.25, "decoder": 0.75},
    "epd": {"encoder": 0.25, "prefill": 0.375, "decoder": 0.375},
}
"""GPU of a replica whose share is not given. One of each stage fits one GPU."""
ACCELERATOR = "accelerator_type:"
ROUNDING = 1e-6


class NotEnoughResources(MmError):
    """No node, or not all nodes together, have what the replicas ask for."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a cluster.

    Attributes:
        total: Resources that it has, by Ray's names: "CPU", "GPU", "accelerator_type:T4".
        free: What of them no other application holds.
    """

    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The replicas of one deployment.

    Attributes:
        stage: What the operator reads.
        num_replicas: How many there are at least.
        options: Ray's options of each replica: `num_cpus`, `num_gpus`, `accelerator_type`, `label_selector`.
        max_per_node: Replicas that one node may hold.
    """

    stage: str
    num_replicas: int
    options: Mapping[str, Any]
    max_per_node: int | None = None

    @property
    def resources(self) -> dict[str, float]:
        """Of one replica, by Ray's names."""
        asked = {"CPU": self.options["num_cpus"], "GPU": self.options.get("num_gpus", 0)}
        if kind := self.options.get("accelerator_type"):
            asked[ACCELERATOR + kind] = 0.001
        return {name: amount for name, amount in asked.items() if amount}

    def suits(self, node: Node) -> bool:
        """Whether a replica could run there if nothing else did."""
        labels = self.options.get("label_selector", {})
        return all(node.total.get(name, 0) >= amount - ROUNDING for name, amount in self.resources.items()) and all(
            label_fits(wanted, node.labels.get(key)) for key, wanted in labels.items()
        )

    def __str__(self) -> str:
        asked = [f"{amount:g} {name}" for name, amount in self.resources.items() if not name.startswith(ACCELERATOR)]
        if kind := self.options.get("accelerator_type"):
            asked.append(f"a GPU of type {kind}")
        asked += [f"the label {key}={value}" for key, value in self.options.get("label_selector", {}).items()]
        return " and ".join(asked) or "nothing"


def label_fits(wanted: str, has: str | None) -> bool:
    """Whether a node's label fits a selector: "value", "!value", "in(a,b)" or "!in(a,b)", as Ray reads them."""
    is_negative = wanted.startswith("!")
    text = wanted.removeprefix("!")
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (has in [value.strip() for value in values]) != is_negative


def demands(config: ServeConfig, nodes: Sequence[Node]) -> list[Demand]:
    """What each deployment asks for, the ones that are hardest to place first.

    Args:
        nodes: With the device "auto" a stage asks for GPUs if one of these that may hold it has one.

    Raises:
        InvalidOption: A setting is for replicas that there are none of.
    """
    check_split(config)
    stages = [
        Demand(
            stage=stage,
            num_replicas=getattr(config, f"num_{stage}s"),
            options=_options(stage, config, nodes),
            max_per_node=getattr(config, f"max_{stage}s_per_node"),
        )
        for stage in reversed(STAGES[config.split])
    ]
    ingress = Demand(stage="ingress", num_replicas=config.num_ingress, options={"num_cpus": config.ingress_cpus})
    return [*stages, ingress]


def _options(stage: str, config: ServeConfig, nodes: Sequence[Node]) -> dict[str, Any]:
    """Ray's options for the replicas of a stage. A decoder gets all its GPUs together, on one node."""
    options: dict[str, Any] = {"num_cpus": getattr(config, f"{stage}_cpus")}
    if kind := getattr(config, f"{stage}_accelerator_type"):
        options["accelerator_type"] = kind
    if labels := getattr(config, f"{stage}_labels"):
        options["label_selector"] = dict(label.split("=", 1) for label in labels)
    share: float | None = getattr(config, f"{stage}_gpus")
    num_members = config.model.tensor_parallel if stage == "decoder" else 1
    if share is None:
        may_hold = Demand(stage=stage, num_replicas=1, options=options)
        has_gpu = any(node.total.get("GPU", 0) > 0 and may_hold.suits(node) for node in nodes)
        on_gpu = config.model.device.startswith("cuda") or (config.model.device == "auto" and has_gpu)
        share = SHARES[config.split][stage] if on_gpu else 0
        if share and num_members > 1:
            share = num_members
    elif num_members > 1 and share not in (0, num_members):
        what = f"was {share:g}; with tensor_parallel={num_members} a decoder takes {num_members} GPUs of one node"
        raise InvalidOption("serve", "decoder_gpus", what)
    if share and ":" in config.model.device:
        given = config.model.device
        raise InvalidOption("model", "device", f"was {given!r}; Ray gives each replica its GPU, so say cuda, or auto")
    options["num_gpus"] = share
    return options


def problem(demands: Iterable[Demand], nodes: Sequence[Node]) -> str | None:
    """Why the nodes cannot hold all replicas, as one line; None if they seem to be able to.

    What is refused here is certain. Whether replicas of several shapes can be packed is left to Ray.
    """
    every = list(demands)
    for one in every:
        suited = [node for node in nodes if one.suits(node)]
        if not suited:
            return f"no node of the cluster has {one} for the {one.stage}; {_has(one, nodes)}"
        most = sum(_most(one, node) for node in suited)
        if most < one.num_replicas:
            return (
                f"{one.num_replicas} x {one} is asked for by {one.stage}s, and the nodes that suit them have room for "
                f"{most}; {_has(one, suited)}"
            )
    for name in ("CPU", "GPU"):
        asked = sum(one.num_replicas * one.resources.get(name, 0) for one in every)
        free = sum(node.free.get(name, 0) for node in nodes)
        if asked > free + ROUNDING:
            parts = ", ".join(
                f"{one.num_replicas} {one.stage}(s) x {one.resources[name]:g}" for one in every if name in one.resources
            )
            return f"the replicas need {asked:g} {name} ({parts}), and the cluster has {free:g} free"
    return None


def _most(one: Demand, node: Node) -> int:
    """How many replicas the node could hold if it held no others. A fraction of a GPU lies on one GPU."""
    counts = [math.inf if one.max_per_node is None else one.max_per_node]
    for name, amount in one.resources.items():
        free = node.free.get(name, 0) + ROUNDING
        if name == "GPU" and amount < 1:
            counts.append(int(free) * int(1 / amount + ROUNDING) + int(free % 1 / amount))
        elif not name.startswith(ACCELERATOR):
            counts.append(int(free / amount))
    found = min(counts)
    return one.num_replicas if found == math.inf else int(found)


def _has(one: Demand, nodes: Sequence[Node]) -> str:
    """What the nodes have of the resources that a replica asks for."""
    names = [name for name in ("CPU", "GPU") if name in one.resources]
    sums = [f"{sum(node.free.get(name, 0) for node in nodes):g} {name}" for name in names]
    kinds = sorted({name.removeprefix(ACCELERATOR) for node in nodes for name in node.total if ACCELERATOR in name})
    types = f" (GPU types: {', '.join(kinds)})" if kinds else ""
    return f"{len(nodes)} node(s) with {' and '.join(sums) or 'nothing'} free{types}"
