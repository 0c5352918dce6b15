"""`mm compare`, once its options are read: check, load, ask, write and print.

Where a folder is given, it writes one picture per reducer with the dropped cells dimmed (all frames of a clip on one
sheet), and the numbers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mm.api import Model
from mm.data.media import FrameSampling, Kind
from mm.data.outputs import KeptMap
from mm.errors import InvalidRequest
from mm.media import MediaBudget, decode_image, decode_video
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import bind, build_reducer, reducer_spec
from serve.cli.matrix import aligned
from serve.compare.overlay import overlay
from serve.compare.run import STAGES, Comparison, Row, compare
from serve.jobs.discover import EXTENSIONS
from serve.page.overlay import has_layout


def run_compare(job: Comparison) -> None:
    """Run a comparison and print it.

    Raises:
        MmError: The file, a reducer or the model cannot be used. Files and reducers are checked before loading.
    """
    kind = _kind_of(job.path)
    reducers = ["none", *(spec for spec in dict.fromkeys(job.reducers) if spec != "none")]
    for spec in reducers:
        build_reducer(spec)
    if job.out is not None:
        _make_folder(job.out)
    model = Model(job.model)
    for spec in reducers:
        bound = bind(reducer_spec(spec), model.encode_parts.model)
        check_compatible(bound.plugin, model.encode_parts.encoder, job.model.model)
    rows = []
    for row, item in compare(model, job, kind, reducers):
        overlay = None if job.out is None or item is None else _write_overlay(job, kind, row.reducer, item)
        rows.append(replace(row, overlay=overlay))
    result = {"file": job.path.name, "prompt": job.prompt, "model": job.model.model, "rows": [asdict(r) for r in rows]}
    if job.out is not None:
        (job.out / "comparison.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write((json.dumps(result, ensure_ascii=False) if job.as_json else table(rows)) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Tokens, times and memory, then the answers."""
    header = ["reducer", "visual tokens", "kept", "KV cache", *(f"{stage} ms" for stage in STAGES), "total ms"]
    lines = [
        [
            row.reducer,
            f"{row.prompt_tokens} of {row.tokens_in}",
            str(row.kept_tokens),
            f"{row.kv_bytes / 2**20:.2f} MiB",
            *(f"{1e3 * row.stages_s[stage]:.1f}" for stage in STAGES),
            f"{1e3 * sum(row.stages_s.values()):.1f}",
        ]
        for row in rows
    ]
    answers = [f"{row.reducer}\n  {row.answer or '(an empty answer)'}" for row in rows]
    overlays = [f"overlay of {row.reducer}: {row.overlay}" for row in rows if row.overlay]
    return "\n".join([*aligned([header, *lines]), "", *answers, *overlays])


def _kind_of(path: Path) -> Kind:
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file; give a picture or a clip", "image")
    kind = EXTENSIONS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(EXTENSIONS))
        raise InvalidRequest(f"{path.name} is no picture and no clip by its name; it may end in {known}", "image")
    return kind


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"cannot write to {folder}: {error.strerror or error}", "out") from None


def _write_overlay(job: Comparison, kind: Kind, reducer: str, item: KeptMap) -> str | None:
    """The path of the picture; None if the model does not report the layout of its tokens."""
    if not has_layout(item):
        return None
    assert job.out is not None
    path = job.out / f"{re.sub(r'[^A-Za-z0-9.=]+', '_', reducer).strip('_')}.png"
    overlay(_frames(job, kind), item).save(path)
    return str(path)


def _frames(job: Comparison, kind: Kind) -> Sequence[np.ndarray]:
    data, budget = job.path.read_bytes(), MediaBudget(job.model.limits)
    if kind == "image":
        return [decode_image(data, budget).pixels]
    sampling = FrameSampling(num_frames=job.model.num_frames, fps=job.model.fps)
    return list(decode_video(data, sampling, budget).frames)
