"""The GPU that Ray gave a replica."""

from __future__ import annotations

import logging
from dataclasses import replace

import ray
import torch

from serve.config import ServeConfig

log = logging.getLogger(__name__)


def on_this_replica(config: ServeConfig) -> ServeConfig:
    """The configuration with the device and the share of it that Ray gave this replica.

    Ray shows a replica the GPUs that it asked for and no others. With the device "auto" one that asked for none
    computes on the CPU, though it may see GPUs that belong to others.
    """
    share = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))
    return placed(config, share, has_cuda=share > 0 and torch.cuda.is_available())


def placed(config: ServeConfig, share: float, *, has_cuda: bool) -> ServeConfig:
    """The configuration of a replica that Ray gave `share` GPUs."""
    device = config.model.device
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
        if share and not has_cuda:
            log.warning("Ray gave this replica %g GPU, and torch sees none: it computes on the CPU", share)
    if not device.startswith("cuda") or not share:
        return replace(config, model=replace(config.model, device=device))
    return replace(config, model=replace(config.model, device=device, gpu_share=min(1.0, share)))
