"""A candidate as settings of `mm serve`, for `mm serve --config FILE`."""

from __future__ import annotations

import json
from typing import Any, get_args

from mm.settings import build, plain_settings, settings_of
from serve.config import KVTransport, ServeConfig, check_split
from serve.planning.curves import PlanError
from serve.planning.layout import Fleet, Layout
from serve.planning.policies import Policies

ANY_GPU = "gpu"
"""The name of GPUs whose kind nobody gave."""


def settings_for(layout: Layout, fleet: Fleet, policies: Policies, keep_ratio: float = 1.0) -> dict[str, Any]:
    """Settings by public name: those with which the curves were measured, the layout, and what was planned with.

    `ServeConfig` has accepted them.

    Raises:
        PlanError: No settings of `mm serve` describe this layout.
    """
    if layout.split == "pd":
        raise PlanError(f"{layout.name}: `mm serve` does not put decode apart from prefill where encode is not apart")
    first = fleet.gpus[layout.decode[0]].curves
    found: dict[str, Any] = dict(first.about.get("settings", {}))
    if model := first.about.get("model"):
        found["model"] = model
    found |= _placed(layout) if first.about.get("device", "cuda") != "cpu" else _on_processors(layout)
    found |= {"max_num_seqs": first.engine.max_num_seqs, "max_batch_tokens": first.engine.max_batch_tokens}
    if keep_ratio < 1:
        found["keep_ratio"] = keep_ratio
    found |= _planned_with(layout, policies)
    check_split(build(ServeConfig, plain_settings(ServeConfig, found, "plan"), "plan"))
    return found


def _planned_with(layout: Layout, policies: Policies) -> dict[str, Any]:
    usual, found = Policies(), dict[str, Any]()
    if policies.num_ingress != usual.num_ingress:
        found["ingresses"] = policies.num_ingress
    if policies.encode_workers != usual.encode_workers:
        found["encode_workers"] = policies.encode_workers
    if layout.split == "epd" and policies.transport in get_args(KVTransport):
        found["kv_transport"] = policies.transport
    return found


def _placed(layout: Layout) -> dict[str, Any]:
    found = {"device": "cuda", **_on_processors(layout)}
    for stage, kinds in _stages(layout).items():
        if len(set(kinds)) > 1:
            raise PlanError(f"{layout.name}: one application of `mm serve` has one kind of GPU per stage")
        found[f"{stage}_gpus"] = 1.0
        if kinds[0] != ANY_GPU:
            found[f"{stage}_accelerator_type"] = kinds[0]
    return found


def _on_processors(layout: Layout) -> dict[str, Any]:
    return {"split": layout.split, **{f"{stage}s": len(kinds) for stage, kinds in _stages(layout).items()}}


def _stages(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Kinds of the GPUs of each stage that has replicas of its own. Text alone needs no GPU to encode on."""
    given = {"encoder": layout.encode, "prefill": layout.prefill, "decoder": layout.decode}
    return {stage: kinds for stage, kinds in given.items() if kinds}


def as_yaml(settings: dict[str, Any], comment: str) -> str:
    """The file. A JSON value is a YAML value."""
    known = {one.name for one in settings_of(ServeConfig)}
    assert settings.keys() <= known, "a name that mm serve does not have"
    lines = [f"# {line}" for line in comment.splitlines()]
    return "\n".join([*lines, *(f"{name}: {json.dumps(value)}" for name, value in settings.items()), ""])
