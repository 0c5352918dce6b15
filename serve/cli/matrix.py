"""Which reducer works with which model: built and checked as a server would, without loading any weights.

A family's class says what its checkpoints may supply; one that supplies less is found out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.errors import MmError, PluginError
from mm.plugins.capabilities import check_compatible, flat_stages
from mm.plugins.registry import get, names
from mm.plugins.spec import build_reducer

KINDS = ("image", "video")
NOT_LISTED = frozenset({"pipeline"})
"""Made of others, and does what they do."""

HOOKS = {"in_prefill": "in_prefill", "prefill_done": "in_decode"}
"""A method's hook inside the decoder, and the stage it means."""


def support_matrix() -> list[dict[str, Any]]:
    """One JSON-ready row per registered reducer with its default options.

    `families` has, by family, `kinds` (what of it the reducer acts on) and `missing` (why it is refused, where it is).
    A reducer that cannot be built or imported has `unavailable` instead of all that.
    """
    encoders = {name: get("encoder", name) for name in names("family")}
    return [_row(name, encoders) for name in names("reducer") if name not in NOT_LISTED]


def _row(name: str, encoders: dict[str, Any]) -> dict[str, Any]:
    try:
        reducer = build_reducer(name)
    except MmError as error:
        return {"name": name, "unavailable": str(error)}
    return {
        "name": name,
        "stages": stages_of(reducer),
        "kinds": [kind for kind in KINDS if kind in _kinds(reducer)],
        "needs": sorted(reducer.needs),
        "query_aware": bool(reducer.query_aware),
        "trained": bool(getattr(reducer, "trained", False)),
        "families": {family: _support(reducer, encoder, family) for family, encoder in encoders.items()},
    }


def stages_of(reducer: Any) -> list[str]:
    """Every stage at which a reducer does something, in the order a token meets them."""
    found = dict.fromkeys(stage.stage.value for stage in flat_stages(reducer))
    found |= dict.fromkeys(stage for hook, stage in HOOKS.items() if hasattr(reducer, hook))
    return list(found)


def _kinds(reducer: Any) -> frozenset[str]:
    return frozenset(getattr(reducer, "kinds", KINDS))


def _support(reducer: Any, encoder: Any, family: str) -> dict[str, Any]:
    try:
        check_compatible(reducer, encoder, family)
    except PluginError as error:
        return {"kinds": [], "missing": list(getattr(error, "missing", None) or [str(error)])}
    kinds = [kind for kind in KINDS if kind in _kinds(reducer) & frozenset(encoder.kinds)]
    takes = ", ".join(sorted(encoder.kinds))
    return {"kinds": kinds, "missing": [] if kinds else [f"input other than {takes}"]}


CELLS = {("image", "video"): "image video", ("image",): "image", ("video",): "      video", (): "-"}


def matrix_table(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix for people, and why what is refused is refused."""
    usable = [row for row in rows if "unavailable" not in row]
    families = list(usable[0]["families"]) if usable else []
    header = ["reducer", "stage", "query", "trained", *families, "needs"]
    lines = [
        [
            row["name"],
            " ".join(row["stages"]),
            "yes" if row["query_aware"] else "no",
            "yes" if row["trained"] else "no",
            *(CELLS[tuple(row["families"][family]["kinds"])] for family in families),
            ", ".join(row["needs"]) or "-",
        ]
        for row in usable
    ]
    refused = [
        f"{row['name']} with {family}: lacks {', '.join(cell['missing'])}"
        for row in usable
        for family, cell in row["families"].items()
        if cell["missing"]
    ]
    refused += [f"{row['name']}: {row['unavailable']}" for row in rows if "unavailable" in row]
    return "\n".join([*aligned([header, *lines]), *refused])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
