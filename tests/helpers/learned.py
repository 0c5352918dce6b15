"""Learned reducers with weights as a training starts with, and folders of such weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mm.plugins.capabilities import is_trained, parts_of
from mm.plugins.registry import create
from mm.plugins.spec import reducer_spec
from mm.plugins.weights import CARD, DECODER, TENSORS, ReducerWeights, checkpoint_fingerprint

SEED = 7


def untrained(reducer: Any, width: int, seed: int = SEED) -> ReducerWeights:
    """The same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return reducer.untrained(width)


def built(text: str, keep_ratio: float | None = None, *, width: int) -> Any:
    """The reducer of a text; learned parts have weights that were never trained, for a decoder of `width`."""
    parts = [
        part.bind(untrained(part, width)) if is_trained(part) else part
        for part in parts_of(reducer_spec(text, keep_ratio).plugin)
    ]
    return parts[0] if len(parts) == 1 else create("reducer", "pipeline", stages=tuple(parts))


def write_weights(
    folder: Path, reducer: Any, model: Path, width: int, *, seed: int = SEED, decoder: Any = None, **card: Any
) -> Path:
    """Write a folder of weights for the checkpoint in `model`; `card` replaces what the card says."""
    weights = untrained(reducer, width, seed)
    folder.mkdir(parents=True, exist_ok=True)
    said = {**weights.card, "base": checkpoint_fingerprint(model), **card}
    (folder / CARD).write_text(json.dumps(said))
    save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, folder / TENSORS)
    if decoder is not None:
        save_file({name: tensor.contiguous() for name, tensor in decoder.items()}, folder / DECODER)
    return folder
