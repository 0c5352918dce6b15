"""Which reducer works with which model family: built and checked as a server would, without loading any weights.

An encoder's class declares what its checkpoints may supply. A checkpoint that supplies less is refused when it is
loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.media import Kind
from mm.errors import IncompatiblePlugin, PluginError
from mm.models.shipped import SHIPPED
from mm.plugins.capabilities import check_compatible
from mm.plugins.encoder import Encoder
from mm.plugins.registry import get, names, reason_of
from mm.plugins.spec import ReducerSpec, bind, reducer_spec
from mm.plugins.weights import names_beside

KINDS: tuple[Kind, ...] = ("image", "video")
NOT_LISTED = frozenset({"pipeline"})
"""Made of others, and does what they do."""


def support_matrix(models: Mapping[str, Path] | None = None) -> list[dict[str, Any]]:
    """One JSON-ready row per registered reducer with its default options.

    `trained_for` has, for a reducer with weights, the models beside which they lie: with "" where they can be used, and
    otherwise with the reason why not. `families` has, by family, `kinds` (what of it the reducer acts on) and `missing`
    (why it is refused, where it is).
    A reducer that cannot be built or imported has `unavailable` instead of all that.

    Args:
        models: Names and folders of models whose learned reducers are looked at; those that ship if not given.
    """
    encoders, models = _encoders(), shipped_models() if models is None else models
    return [_row(name, encoders, models) for name in names("reducer") if name not in NOT_LISTED]


def shipped_models() -> dict[str, Path]:
    """Names and folders of the models that ship."""
    return {path.name: path for path in sorted(SHIPPED.iterdir()) if path.is_dir()}


def _trained_for(spec: ReducerSpec, models: Mapping[str, Path]) -> dict[str, str]:
    """Models that have weights for a learned reducer, and why they cannot be used; a model without any is left out."""
    found: dict[str, str] = {}
    for model, folder in models.items():
        if spec.capabilities.trained and set(names_beside(folder)) & {part.name for part in spec.parts}:
            try:
                bind(spec, folder)
                found[model] = ""
            except PluginError as error:
                found[model] = reason_of(error)
    return found


def _encoders() -> dict[str, type[Encoder]]:
    """The encoder of each family. A family whose encoder cannot be imported has no column."""
    found: dict[str, type[Encoder]] = {}
    for name in names("family"):
        try:
            found[name] = get("encoder", name)
        except PluginError:
            continue
    return found


def _row(name: str, encoders: dict[str, type[Encoder]], models: Mapping[str, Path]) -> dict[str, Any]:
    try:
        spec = reducer_spec(name)
    except PluginError as error:
        return {"name": name, "unavailable": reason_of(error)}
    able = spec.capabilities
    return {
        "name": name,
        "stages": [stage.value for stage in able.stages],
        "kinds": [kind for kind in KINDS if kind in able.kinds],
        "needs": sorted(able.needs),
        "query_aware": able.query_aware,
        "trained": able.trained,
        "trained_for": _trained_for(spec, models),
        "families": {family: _support(spec, encoder, family) for family, encoder in encoders.items()},
    }


def _support(spec: ReducerSpec, encoder: Any, family: str) -> dict[str, Any]:
    """One cell. The encoder is a class, whose class variables say what its checkpoints may supply."""
    try:
        check_compatible(spec.plugin, encoder, family)
    except PluginError as error:
        return {"kinds": [], "missing": list(error.missing) if isinstance(error, IncompatiblePlugin) else [str(error)]}
    kinds = [kind for kind in KINDS if kind in spec.capabilities.kinds & frozenset(encoder.kinds)]
    takes = ", ".join(sorted(encoder.kinds))
    return {"kinds": kinds, "missing": [] if kinds else [f"input other than {takes}"]}


CELLS = {("image", "video"): "image video", ("image",): "image", ("video",): "      video", (): "-"}


def matrix_table(rows: Sequence[dict[str, Any]]) -> str:
    """The matrix for people, and why what is refused is refused."""
    usable = [row for row in rows if "unavailable" not in row]
    families = list(usable[0]["families"]) if usable else []
    header = ["reducer", "stage", "query", "trained for", *families, "needs"]
    lines = [
        [
            row["name"],
            " ".join(row["stages"]),
            "yes" if row["query_aware"] else "no",
            ", ".join(model for model, problem in row["trained_for"].items() if not problem) or "no weights"
            if row["trained"]
            else "-",
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
    refused += [problem for row in usable for problem in row["trained_for"].values() if problem]
    refused += [f"{row['name']}: {row['unavailable']}" for row in rows if "unavailable" in row]
    return "\n".join([*aligned([header, *lines]), *refused])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
