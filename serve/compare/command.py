"""`mm compare`: one question about one picture or clip, answered with several reducers side by side.

Nothing is cached between them, and a first answer that is not shown warms the model up. Writes, where a folder is
given, one picture per reducer with the dropped cells dimmed (all frames of a clip on one sheet), and the numbers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mm.api import Model, build_request, collect
from mm.config import ModelConfig
from mm.data.media import FrameSampling, Kind
from mm.data.outputs import KeptMap
from mm.errors import InvalidRequest
from mm.media import MediaBudget, decode_image, decode_video
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import build_reducer
from serve.cli.matrix import aligned
from serve.jobs.discover import EXTENSIONS
from serve.page.overlay import frame_of_slice, has_layout, kept_mask

STAGES = ("load", "encode", "reduce", "prefill", "decode")
DROPPED, DIM = np.array([15.0, 23.0, 42.0]), 0.78
"""The colour that dropped cells fade to, and how far."""

SHEET_COLUMNS, GAP_PX, FRAME_SIDE_PX, PICTURE_SIDE_PX = 4, 4, 320, 960


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One run of `mm compare`.

    Attributes:
        path: A picture or clip.
        reducers: Compared in this order, behind "none".
        out: Folder for overlays and numbers; None writes nothing.
        as_json: Numbers as JSON on stdout in place of the table.
    """

    path: Path
    prompt: str
    reducers: tuple[str, ...]
    model: ModelConfig = field(default_factory=ModelConfig)
    max_tokens: int = 128
    out: Path | None = None
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one reducer did.

    Attributes:
        prompt_tokens: Visual tokens that entered the decoder.
        kept_tokens: Visual tokens left behind the last layer that dropped some.
        kv_bytes: Of the rows in the cache when the first token came, text included, in whole blocks.
        stages_s: Seconds of each stage.
        overlay: The file with the kept tokens, where there is one.
    """

    reducer: str
    answer: str
    tokens_in: int
    prompt_tokens: int
    kept_tokens: int
    kv_bytes: int
    stages_s: dict[str, float]
    overlay: str | None = None


def run_compare(job: Comparison) -> None:
    """Load, ask, write and print.

    Raises:
        MmError: Names what was given and what to do; before the model is loaded where that can be known.
    """
    kind = _kind_of(job.path)
    reducers = ["none", *(spec for spec in dict.fromkeys(job.reducers) if spec != "none")]
    for spec in reducers:
        build_reducer(spec)
    if job.out is not None:
        _make_folder(job.out)
    model = Model(job.model)
    for spec in reducers:
        check_compatible(build_reducer(spec), model.encode_parts.encoder, job.model.model)
    rows = []
    for row, item in compare(model, job, kind, reducers):
        overlay = None if job.out is None or item is None else _write_overlay(job, kind, row.reducer, item)
        rows.append(replace(row, overlay=overlay))
    result = {"file": job.path.name, "prompt": job.prompt, "model": job.model.model, "rows": [asdict(r) for r in rows]}
    if job.out is not None:
        (job.out / "comparison.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write((json.dumps(result, ensure_ascii=False) if job.as_json else table(rows)) + "\n")


def compare(model: Model, job: Comparison, kind: Kind, reducers: Sequence[str]) -> Iterator[tuple[Row, KeptMap | None]]:
    """Each reducer's row, and which tokens it kept."""
    for turn, spec in enumerate([reducers[0], *reducers]):
        media: dict[str, Any] = {"images": [job.path]} if kind == "image" else {"videos": [job.path]}
        options = {"reducer": spec, "temperature": 0.0, "max_new_tokens": job.max_tokens}
        request = build_request(job.prompt, **media, **options)
        answer = collect(model.run(request))
        if not turn:
            continue  # the first answer pays for what is done once per process
        usage, timings = answer.usage, asdict(answer.timings)
        yield (
            Row(
                reducer=spec,
                answer=answer.text.strip(),
                tokens_in=usage.num_visual_tokens_in,
                prompt_tokens=usage.num_image_tokens_prompt + usage.num_video_tokens_prompt,
                kept_tokens=usage.num_visual_tokens_kept,
                kv_bytes=answer.kv_bytes,
                stages_s={stage: round(timings[f"{stage}_s"], 6) for stage in STAGES},
            ),
            answer.kept[0] if answer.kept else None,
        )


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


# ── overlays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_overlay(job: Comparison, kind: Kind, reducer: str, item: KeptMap) -> str | None:
    """The overlay's path; None where the model does not say where in the picture its tokens lie."""
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


def overlay(frames: Sequence[np.ndarray], item: KeptMap) -> PIL.Image.Image:
    """The pictures with the dropped cells dimmed, those of a clip in reading order on one sheet.

    Args:
        frames: uint8 (H, W, 3) each; a step of the grid takes the frame that stands for it.
    """
    mask, side_px = kept_mask(item), FRAME_SIDE_PX if item.kind == "video" else PICTURE_SIDE_PX
    shown = [_dimmed(frames[frame_of_slice(i, len(mask), len(frames))], kept, side_px) for i, kept in enumerate(mask)]
    width, height = shown[0].size
    columns = min(SHEET_COLUMNS, len(shown))
    num_rows = -(-len(shown) // columns)
    size = columns * (width + GAP_PX) - GAP_PX, num_rows * (height + GAP_PX) - GAP_PX
    sheet = PIL.Image.new("RGB", size, "white")
    for i, picture in enumerate(shown):
        sheet.paste(picture, (i % columns * (width + GAP_PX), i // columns * (height + GAP_PX)))
    return sheet


def _dimmed(pixels: np.ndarray, kept: np.ndarray, side_px: int) -> PIL.Image.Image:
    """A picture with a longest side of `side_px`; cells of `kept` (h, w) that are False are dimmed."""
    scale = side_px / max(pixels.shape[:2])
    width, height = (max(1, round(scale * side)) for side in (pixels.shape[1], pixels.shape[0]))
    picture = np.asarray(PIL.Image.fromarray(pixels).resize((width, height)), float)
    cells = PIL.Image.fromarray((~kept).astype(np.uint8)).resize((width, height), PIL.Image.Resampling.NEAREST)
    share = DIM * np.asarray(cells, float)[..., None]
    return PIL.Image.fromarray(((1 - share) * picture + share * DROPPED).round().astype(np.uint8))


__all__ = ["Comparison", "Row", "compare", "overlay", "run_compare", "table"]
