"""The reduction methods that benchmarks compare, and how each takes its budget of tokens.

`pool2` has only its quarter. FastV acts at layer 1 of the shipped model's 4. Its published layer 2 of 32 would be none
of them, and the default of 2 keeps all tokens in half of the decoder. MustDrop has thresholds in place of a ratio.
"""

from __future__ import annotations

from mm.data.media import Kind
from mm.plugins.registry import get, names, options_of

RATIOS = (0.1, 0.25, 0.05, 0.5, 1.0)
"""In the order in which they are run: the most informative first."""

NO_METHOD = frozenset({"none", "pipeline", "scheduled"})
"""Made of others, or of a schedule that `mm tune` finds."""

BASE = {"fastv": "layer=1"}


def methods_for(kind: Kind) -> list[str]:
    """Every registered training-free reducer that acts on items of this kind, `none` first."""
    found = [
        name
        for name in names("reducer")
        if name not in NO_METHOD and not getattr(get("reducer", name), "trained", False)
    ]
    return ["none", *(name for name in found if kind in getattr(get("reducer", name), "kinds", ("image", "video")))]


def ratios_of(method: str) -> tuple[float, ...]:
    """The ones of `RATIOS` at which a method can be run."""
    if method == "none":
        return (1.0,)
    if method == "pool2":
        return (0.25,)
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
    if "keep_ratio" not in options_of(get("reducer", method)):
        raise SystemExit(f"{method} has no keep_ratio: add its budget to spec_of")
    extra = BASE.get(method)
    return f"{method}:{f'{extra},' if extra else ''}keep_ratio={keep_ratio:g}"
