"""A candidate as settings of `mm serve`, for `mm serve --config FILE`."""

from __future__ import annotations

import json
from typing import Any

from mm.settings import build, plain_settings, settings_of
from serve.config import ServeConfig
from serve.deployments.placement import DECODER_SHARE, ENCODER_SHARE
from serve.planning.curves import PlanError
from serve.planning.layout import Fleet, Layout

ANY_GPU = "gpu"
"""The name of GPUs whose kind nobody gave."""


def settings_for(layout: Layout, fleet: Fleet, keep_ratio: float = 1.0) -> dict[str, Any]:
    """Settings by public name. `ServeConfig` has accepted them.

    Raises:
        PlanError: No settings of `mm serve` describe this layout.
    """
    if layout.split in ("pd", "epd"):
        raise PlanError(f"{layout.name}: this version of `mm serve` does not put prefill and decode apart")
    first = fleet.gpus[layout.decode[0]].curves
    found: dict[str, Any] = {}
    if model := first.about.get("model"):
        found["model"] = model
    found |= _placed(layout) if first.about.get("device", "cuda") != "cpu" else _on_processors(layout)
    found |= {"max_num_seqs": first.engine.max_num_seqs, "max_batch_tokens": first.engine.max_batch_tokens}
    if keep_ratio < 1:
        found["keep_ratio"] = keep_ratio
    build(ServeConfig, plain_settings(ServeConfig, found, "plan"), "plan")
    return found


def _placed(layout: Layout) -> dict[str, Any]:
    encode = layout.encode or layout.decode
    shares = (1.0, 1.0) if layout.encode else (ENCODER_SHARE, DECODER_SHARE)
    found = {
        "device": "cuda",
        "encoders": len(encode),
        "decoders": len(layout.decode),
        "encoder_gpus": shares[0],
        "decoder_gpus": shares[1],
    }
    for stage, kinds in (("encoder", encode), ("decoder", layout.decode)):
        if len(set(kinds)) > 1:
            raise PlanError(f"{layout.name}: one application of `mm serve` has one kind of GPU per stage")
        if kinds[0] != ANY_GPU:
            found[f"{stage}_accelerator_type"] = kinds[0]
    return found


def _on_processors(layout: Layout) -> dict[str, Any]:
    return {"device": "cpu", "encoders": len(layout.encode or layout.decode), "decoders": len(layout.decode)}


def as_yaml(settings: dict[str, Any], comment: str) -> str:
    """The file. A JSON value is a YAML value."""
    known = {one.name for one in settings_of(ServeConfig)}
    assert settings.keys() <= known, "a name that mm serve does not have"
    lines = [f"# {line}" for line in comment.splitlines()]
    return "\n".join([*lines, *(f"{name}: {json.dumps(value)}" for name, value in settings.items()), ""])
