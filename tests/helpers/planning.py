"""Curves and fleets of round numbers, for the planner's tests."""

from __future__ import annotations

from typing import Any

from serve.planning.curves import Curves, parse_curves
from serve.planning.layout import Fleet, Gpu


def curves_data(**changes: Any) -> dict[str, Any]:
    """A picture takes 100 ms, 100 prompt tokens 10 ms, a step that decodes 20 ms."""
    data: dict[str, Any] = {
        "schema": 1,
        "encode": {"patches": [0, 1000], "batch": [0, 10], "seconds": [[0, 0], [0, 1.0]]},
        "prefill": {"tokens": [0, 1000], "cached": [0], "seconds": [[0], [0.1]]},
        "decode": {"batch": [1], "context": [0], "seconds": [[0.02]]},
        "picture": {"patches": 1000, "tokens": 100},
        "engine": {"max_num_seqs": 8, "max_batch_tokens": 1000},
    }
    return data | changes


def curves(**changes: Any) -> Curves:
    return parse_curves(curves_data(**changes), "the test")


def fleet(num: int, price: float | None = None, **changes: Any) -> Fleet:
    """So many GPUs of one kind."""
    return Fleet(gpus={"gpu": Gpu(name="gpu", curves=curves(**changes), price=price)}, counts={"gpu": num})
