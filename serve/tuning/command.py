"""`mm tune`, once its options are read."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import mm
from mm.config import ModelConfig
from mm.errors import InvalidOption
from mm.models.checkpoint import find, weights_hash
from serve.evaluation.items import choose, read_test_set
from serve.evaluation.report import progress
from serve.tuning.greedy import greedy, most_trials
from serve.tuning.schedule import Schedule, Shape, spec_of
from serve.tuning.trials import Journal, Trials

Search = Literal["greedy", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One run of `mm tune`.

    Attributes:
        data: A Parquet file as `mm eval` reads it; None for the held-out set we ship.
        out: The reducer's file; the trials are remembered beside it.
        search: "sigmoid" under `budget`, or "greedy" down to what `tolerance` allows.
        budget: FLOPs of the decoder's prefill / FLOPs with every visual token.
        tolerance: Share of all items that may be answered wrong although the whole prompt gets them right.
        num_trials: Curves that the sigmoid search tries.
        tasks, limit: Which items; `limit` counts per task and wording.
    """

    data: Path | None = None
    out: Path = Path("reducer.json")
    search: Search = "sigmoid"
    budget: float | None = None
    tolerance: float = 0.01
    num_trials: int = 20
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    quiet: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    num_frames: int = 16
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.search == "sigmoid" and self.budget is None:
            raise InvalidOption("tune", "budget", "is missing; give the share of FLOPs to spend, such as --budget 0.5")
        if self.search == "sigmoid" and not all(map(find_spec, ("sklearn", "scipy"))):
            problem = "was sigmoid, which needs scikit-learn: pip install 'mm-serving[tune]', or take --search greedy"
            raise InvalidOption("tune", "search", problem)
        if self.search == "greedy" and self.budget is not None:
            raise InvalidOption("tune", "budget", "cannot go with the greedy search, which spends as little as it can")
        if not 0 <= self.tolerance < 1:
            raise InvalidOption("tune", "tolerance", f"was {self.tolerance:g}; it has to be from 0 to below 1")


def run_tuning(job: Tuning) -> None:
    """Search, write the reducer's file and print the result. A search that was stopped continues.

    Raises:
        MmError: Names what was given and what to do.
    """
    test_set = read_test_set(job.data)
    items = choose(test_set, job.tasks, None, job.limit)
    about = {
        "model": job.model.model,
        "weights": weights_hash(find(job.model.model)),
        "dtype": job.model.dtype,
        "data": test_set.sha256,
        "items": len(items),
        "tasks": sorted({item.task for item in items}),
        "limit": job.limit,
        "num_frames": job.num_frames,
        "max_tokens": job.max_tokens,
    }
    journal = Journal(job.out.with_suffix(".trials.jsonl"), about)
    model = mm.Model(job.model)
    num_layers = model.native_engine.family.language.num_layers
    most = job.num_trials if job.search == "sigmoid" else most_trials(num_layers)
    with progress((most + 1) * len(items), quiet=job.quiet) as advance:
        trials = Trials(model, items, journal, num_frames=job.num_frames, max_tokens=job.max_tokens, advance=advance)
        found = _found(job, model, trials, len(items))
    result = found | {"about": about, "versions": {name: version(name) for name in ("mm-serving", "torch")}}
    job.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"{found['reducer']}\nright {found['right']} of {len(items)}, with every token {found['right_with_all']}; "
        f"{found['flop_share']:.1%} of the prefill's FLOPs\nwritten to {job.out}; use it with --reducer {job.out}\n"
    )


def _found(job: Tuning, model: mm.Model, trials: Trials, num_items: int) -> dict[str, Any]:
    whole = trials.trial("none")
    language: Any = model.native_engine.family.language
    shape = Shape.of(language.config, language.head_dim, whole.num_visual, whole.num_text)

    def num_right(schedule: Schedule) -> int:
        return trials.trial(spec_of(schedule)).num_right

    if job.search == "greedy":
        least = whole.num_right - job.tolerance * num_items
        schedule = greedy(shape.num_layers, lambda one: num_right(one) >= least)
    else:
        from serve.tuning.sigmoid import search

        assert job.budget is not None
        schedule = search(shape, job.budget, job.num_trials, num_right)
    return {
        "reducer": spec_of(schedule),
        "search": job.search,
        "budget": job.budget,
        "tolerance": job.tolerance if job.search == "greedy" else None,
        "keep_ratios": list(schedule),
        "flop_share": round(shape.flop_share(schedule), 6),
        "right": num_right(schedule),
        "right_with_all": whole.num_right,
    }
