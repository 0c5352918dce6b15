"""Pictures and clips as HTML: what was chosen, and which of its tokens were kept.

The pictures of an answer are given once, as variables of the style sheet, however many answers are drawn over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mm.data.outputs import KeptMap
from serve.page.media import Preview
from serve.page.overlay import border_path, dropped_path, frame_of_slice, has_layout, kept_mask

NO_LAYOUT = "This model does not say where in the picture its tokens lie."
DIM = 0.78
"""How much dropped cells are dimmed at first."""


def plain_pictures(preview: Preview, title: str) -> str:
    """What was chosen, before anything was asked."""
    captions = [f"{time_s:.1f} s" for time_s in preview.timestamps_s] or [""]
    figures = "".join(
        f'<figure><img src="{url}" alt="{escape(caption) or "the chosen picture"}">{_caption(caption)}</figure>'
        for url, caption in zip(preview.urls, captions, strict=True)
    )
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<div class="mm-chosen">{head}<div class="{_layout(preview)}">{figures}</div></div>'


def shared_frames(previews: Sequence[Preview]) -> str:
    """The frames of all items, to which the maps of all answers refer."""
    variables = "".join(
        f"{_variable(item, frame)}:url({url});"
        for item, preview in enumerate(previews)
        for frame, url in enumerate(preview.urls)
    )
    return f"<style>:root{{{variables}}}</style>"


def dim_slider() -> str:
    """How much of what was dropped is dimmed, in all maps."""
    return (
        f'<label class="mm-dim">Dim what was dropped<input type="range" min="0" max="1" step="0.01" value="{DIM}" '
        "oninput=\"document.documentElement.style.setProperty('--mm-dim', this.value)\"></label>"
    )


def kept_pictures(previews: Sequence[Preview], kept: Sequence[KeptMap]) -> str:
    """Every item of a conversation with its dropped cells dimmed; a clip frame by frame, above a time line."""
    items = zip(previews, kept, strict=False)
    return "".join(_item(number, preview, item) for number, (preview, item) in enumerate(items))


def _item(number: int, preview: Preview, item: KeptMap) -> str:
    if item.cubes:
        return _cut_clip(number, preview, item)
    if not has_layout(item):
        return f'<p class="mm-note">{NO_LAYOUT}</p>'
    mask = kept_mask(item)
    cells = item.grid[1] * item.grid[2]
    figures: list[str] = []
    for step, kept in enumerate(mask):
        frame = frame_of_slice(step, len(mask), len(preview.urls))
        caption = f"{int(kept.sum())} of {cells} kept"
        if preview.timestamps_s:
            caption = f"{preview.timestamps_s[frame]:.1f} s · {int(kept.sum())}/{cells}"
        figures.append(_figure(number, frame, preview, caption, _shapes(kept)))
    shares = [float(kept.mean()) for kept in mask]
    return _layers(preview, figures) + (_kept_line(preview, shares) if preview.timestamps_s else "")


def _kept_line(preview: Preview, shares: Sequence[float]) -> str:
    """A time line with one bar for each step of the grid, as high as the share that was kept."""
    end_s = max(preview.timestamps_s[-1], 1e-9)
    bars: list[str] = []
    for step, share in enumerate(shares):
        time_s = preview.timestamps_s[frame_of_slice(step, len(shares), len(preview.urls))]
        place = f"left:{100 * step / len(shares):.3f}%;width:{100 / len(shares):.3f}%"
        bars.append(
            f'<i style="{place}" title="{time_s:.1f} s: {share:.0%} kept"><b style="height:{share:.1%}"></b></i>'
        )
    label = f"Share kept over time: {', '.join(f'{share:.0%}' for share in shares)}"
    ends = f'<div class="mm-ends"><span>{preview.timestamps_s[0]:.1f} s</span><span>{end_s:.1f} s</span></div>'
    return f'<div class="mm-timeline mm-shares" role="img" aria-label="{label}">{"".join(bars)}</div>{ends}'


def _cut_clip(number: int, preview: Preview, item: KeptMap) -> str:
    """The frames of a clip above the pieces into which it was cut, and when each begins."""
    num_frames, total_s = item.grid[0], max(item.cubes[-1].end_s, 1e-9)
    first = {cube.first_frame: i for i, cube in enumerate(item.cubes, 1)}
    figures: list[str] = []
    for step in range(len(preview.urls)):
        frame = step * num_frames // len(preview.urls)
        begins = f" · cube {first[frame]}" if frame in first else ""
        figures.append(_figure(number, step, preview, f"{preview.timestamps_s[step]:.1f} s{begins}"))
    pieces = "".join(
        f'<i style="left:{100 * cube.start_s / total_s:.3f}%;width:{100 * (cube.end_s - cube.start_s) / total_s:.3f}%" '
        f'title="cube {i}: {cube.num_frames} frames, {cube.start_s:.1f} s to {cube.end_s:.1f} s">{cube.start_s:.1f}</i>'
        for i, cube in enumerate(item.cubes, 1)
    )
    label = f"{len(item.cubes)} cubes of {num_frames} frames; {len(item.kept)} tokens"
    line = f'<div class="mm-timeline" role="img" aria-label="{label}">{pieces}</div>'
    return _layers(preview, figures) + line + f'<p class="mm-note">{label}</p>'


def _layers(preview: Preview, figures: Sequence[str]) -> str:
    return f'<div class="mm-map {_layout(preview)}">{"".join(figures)}</div>'


def _layout(preview: Preview) -> str:
    return "mm-frames" if preview.timestamps_s else "mm-single"


def _figure(item: int, frame: int, preview: Preview, caption: str, shapes: str = "") -> str:
    look = f"aspect-ratio:{preview.aspect_ratio:.4f};background-image:var({_variable(item, frame)})"
    return f'<figure><div class="mm-pic" style="{look}">{shapes}</div>{_caption(caption)}</figure>'


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _variable(item: int, frame: int) -> str:
    return f"--mm-item-{item}-frame-{frame}"


def _shapes(kept: np.ndarray) -> str:
    h, w = kept.shape
    label = f"{int(kept.sum())} of {h * w} tokens kept"
    return (
        f'<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path class="mm-dropped" shape-rendering="crispEdges" d="{dropped_path(kept)}"/>'
        f'<path class="mm-border" d="{border_path(kept)}"/></svg>'
    )
