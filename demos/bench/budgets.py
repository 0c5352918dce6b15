"""The reduction methods that benchmarks compare, and how each takes its budget of tokens.

`pool2` has only its quarter. FastV acts at layer 1 of the shipped model's 4. Its published layer 2 of 32 would be none
of them, and the default of 2 keeps all tokens in half of the decoder. MustDrop and PixelPrune have thresholds in place
of a ratio. `native` needs a checkpoint with a knob of its own, which the shipped models do not have.
"""

from __future__ import annotations

import json
from pathlib import Path

from mm.config import REDUCERS_FOLDER
from mm.data.media import Kind
from mm.plugins.registry import get, names, options_of
from mm.plugins.weights import CARD

RATIOS = (0.1, 0.25, 0.05, 0.5, 1.0)
"""In the order in which they are run: the most informative first."""

NO_METHOD = frozenset({"native", "none", "pipeline", "scheduled"})
"""Made of others, or of a schedule that `mm tune` finds, or not for the models that are shipped."""

THRESHOLDS = {"mustdrop": (1e-5, 0.3), "pixelprune": (1e-3, 0.6)}
"""Methods with a threshold in place of a ratio, and between which values it is searched."""

BASE = {"fastv": "layer=1"}


LEAST_OF_ROUTER = 0.25
"""It pools every group of four then."""

CUBE_SHARE = 0.25
"""Tokens of a cube / those of a frame: a clip of cubes of one frame keeps so much."""


def methods_for(kind: Kind, folder: Path | None = None) -> list[str]:
    """Every registered reducer that acts on items of this kind: `none` first, those with trained weights last.

    Args:
        folder: The model's. Learned reducers are left out that have no weights beside it, or whose weights keep items
            of this kind whole.
    """
    found = [name for name in names("reducer") if name not in NO_METHOD and _has_weights(name, kind, folder)]
    mine = [name for name in found if kind in getattr(get("reducer", name), "kinds", ("image", "video"))]
    return ["none", *sorted(mine, key=is_learned)]


def is_learned(method: str) -> bool:
    """Whether a method has trained weights."""
    return bool(getattr(get("reducer", method), "trained", False))


def _has_weights(method: str, kind: Kind, folder: Path | None) -> bool:
    if not is_learned(method):
        return True
    card = None if folder is None else folder / REDUCERS_FOLDER / method / CARD
    return card is not None and card.is_file() and kind in json.loads(card.read_text()).get("media", [kind])


def ratios_of(method: str) -> tuple[float, ...]:
    """The ones of `RATIOS` at which a method can be run."""
    if method == "none":
        return (1.0,)
    if method == "pool2":
        return (0.25,)
    if method == "router":
        return tuple(ratio for ratio in RATIOS if ratio >= LEAST_OF_ROUTER)
    if method == "cubes":
        return tuple(ratio for ratio in RATIOS if ratio <= CUBE_SHARE)
    return RATIOS


def spec_of(method: str, keep_ratio: float, threshold: float | None = None) -> str:
    """The specification of `method` that keeps `keep_ratio` of the tokens.

    Args:
        threshold: For a method without a ratio.
    """
    if method in ("none", "pool2"):
        return method
    if method == "mustdrop" and keep_ratio == 1:
        return "mustdrop:window=1,key_ratio=0,global_share=0,peak=0"
    if method == "mustdrop":
        keys = min(0.08, keep_ratio / 2)
        return f"mustdrop:key_ratio={keys:g},global_share={threshold:.6g},peak={threshold:.6g}"
    if method == "pixelprune":
        return f"pixelprune:tau={0 if threshold is None else threshold:.4g}"
    if method == "cubes":
        return f"cubes:frames_per_cube={round(CUBE_SHARE / keep_ratio)}"
    if "keep_ratio" not in options_of(get("reducer", method)):
        raise SystemExit(f"{method} has no keep_ratio: add its budget to spec_of")
    extra = BASE.get(method)
    return f"{method}:{f'{extra},' if extra else ''}keep_ratio={keep_ratio:g}"
