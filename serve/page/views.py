"""Fragments of HTML that show a reply. Pure functions; every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mm.data.outputs import KeptMap
from serve.page.client import Reply
from serve.page.media import Preview
from serve.page.overlay import border_path, dropped_path, frame_of_slice, has_layout, kept_mask

STAGES = ("load", "encode", "reduce", "queue", "prefill", "decode")
FULL, REDUCED = "full", "reduced"
TITLES = {FULL: "Every token", REDUCED: "Reduced"}


def heading(server: str = "") -> str:
    """The page's first line; `server` is one of the two lines below."""
    return (
        '<div class="mm-head"><h1>mm</h1>'
        f"<p>Question about a picture or a clip, once with every visual token and once with fewer.</p>{server}</div>"
    )


def server_line(model: str, url: str, limits: str = "") -> str:
    """The model and its server, with what the model cannot do."""
    note = f'<p class="mm-limits">{escape(limits)}</p>' if limits else ""
    return f'<div class="mm-server">{escape(model)} at <code>{escape(url)}</code></div>{note}'


def server_down(message: str) -> str:
    return f'<div class="mm-server mm-down" role="alert">{escape(message)}</div>'


def error(message: str, hint: str = "") -> str:
    small = f"<small>{escape(hint)}</small>" if hint else ""
    return f'<div class="mm-error" role="alert">{escape(message)}{small}</div>'


def waiting_card(side: str, note: str, *, busy: bool = False) -> str:
    """A card that has no answer yet."""
    classes = "mm-wait mm-busy" if busy else "mm-wait"
    return _card(side, "", f'<div class="{classes}"><p>{escape(note)}</p></div>')


def error_card(side: str, detail: str, message: str, hint: str = "") -> str:
    return _card(side, detail, error(message, hint))


def answer_card(side: str, detail: str, reply: Reply, scale_s: float, expected: str | None = None) -> str:
    """An answer and what it took.

    Args:
        detail: How the tokens were reduced.
        scale_s: Seconds of a full bar, the same for both cards.
        expected: The right answer, where it is known.
    """
    body = [f'<p class="mm-answer">{_text(reply)}</p>']
    if expected is not None:
        body.append(f'<p class="mm-expected">The right answer: {escape(expected)}</p>')
    if reply.finish_reason == "length":
        body.append('<p class="mm-note">Cut off at the limit of answer tokens.</p>')
    body += [f'<p class="mm-note">All tokens were kept: {escape(fault)}</p>' for fault in reply.reducer_faults]
    body += [_drafting(reply), _meter(reply), _bars(reply, scale_s), _usage(reply)]
    return _card(side, detail, "".join(body))


def _card(side: str, detail: str, body: str) -> str:
    head = f"<h2>{TITLES[side]}<span>{escape(detail)}</span></h2>"
    return f'<section class="mm-card mm-{side}" aria-live="polite">{head}{body}</section>'


def _text(reply: Reply) -> str:
    """The answer, with what was drafted and accepted marked."""
    if not reply.text.strip():
        return "<em>(an empty answer)</em>"
    if "".join(piece.text for piece in reply.pieces) != reply.text:
        return escape(reply.text.strip())
    marked = (
        f'<mark class="mm-drafted">{escape(piece.text)}</mark>' if piece.is_drafted else escape(piece.text)
        for piece in reply.pieces
        if piece.text
    )
    return "".join(marked).strip()


def _drafting(reply: Reply) -> str:
    """How much of the answer was drafted, beside the colour it has."""
    if reply.mean_acceptance_length is None:
        return ""
    drafted = sum(piece.num_tokens for piece in reply.pieces if piece.is_drafted)
    return (
        f'<p class="mm-note mm-drafting"><mark class="mm-drafted">Drafted and accepted</mark>: {drafted:,} of '
        f"{reply.num_completion_tokens:,} tokens. Mean accepted length <b>{reply.mean_acceptance_length:.2f}</b> "
        "tokens per step with a draft, the step's own included.</p>"
    )


def _meter(reply: Reply) -> str:
    tokens_in, kept = reply.num_visual_tokens_in, reply.num_visual_tokens_kept
    if tokens_in is None or kept is None:
        return '<p class="mm-note">This server does not report visual tokens.</p>'
    share = kept / tokens_in if tokens_in else 0.0
    return (
        f'<div class="mm-meter"><b>{kept:,}</b> <span>of {tokens_in:,} visual tokens ({share:.0%})</span>'
        f'<div class="mm-track"><i style="width:{share:.2%}"></i></div></div>'
    )


def stages_of(reply: Reply) -> list[tuple[str, float]]:
    """(stage, seconds) in the order a request meets them; a queue without waiting is left out."""
    known = [stage for stage in STAGES if stage in reply.timings_s]
    unknown = [stage for stage in reply.timings_s if stage not in STAGES]
    times = [(stage, reply.timings_s[stage]) for stage in (*known, *unknown)]
    return [(stage, seconds) for stage, seconds in times if stage != "queue" or seconds >= 0.001]


def longest_stage_s(*replies: Reply | None) -> float:
    """Seconds of the longest stage of any reply: the common scale of their bars."""
    return max((seconds for reply in replies if reply for _, seconds in stages_of(reply)), default=0.0)


def _bars(reply: Reply, scale_s: float) -> str:
    rows = stages_of(reply)
    if not rows:
        return '<p class="mm-note">This server does not report stage times.</p>'
    cells = [_bar(stage, seconds, scale_s) for stage, seconds in rows]
    total = (
        '<dt class="mm-total">total</dt><dd></dd>'
        f'<dd class="mm-ms mm-total">{milliseconds(sum(seconds for _, seconds in rows))}</dd>'
    )
    cached = dict(rows).get("load") == dict(rows).get("encode") == 0
    note = '<p class="mm-note">The encoder had this in its cache.</p>' if cached else ""
    return f'<dl class="mm-bars">{"".join(cells)}{total}</dl>{note}'


def _bar(stage: str, seconds: float, scale_s: float) -> str:
    width = seconds / scale_s if scale_s else 0.0
    bar = f'<i style="width:{width:.2%}"></i>' if seconds else ""
    return f'<dt>{escape(stage)}</dt><dd class="mm-bar">{bar}</dd><dd class="mm-ms">{milliseconds(seconds)}</dd>'


def _usage(reply: Reply) -> str:
    cached = f" ({reply.num_cached_tokens:,} of them cached)" if reply.num_cached_tokens else ""
    return (
        f'<p class="mm-note">{reply.num_prompt_tokens:,} prompt{cached} + '
        f"{reply.num_completion_tokens:,} answer tokens, {milliseconds(reply.wall_s)} round trip</p>"
    )


def milliseconds(seconds: float) -> str:
    """Short, for columns: 0 ms, 0.4 ms, 38 ms, 1,240 ms."""
    value = seconds * 1000
    if not value:
        return "0 ms"
    return f"{value:.1f} ms" if value < 9.95 else f"{value:,.0f} ms"


def comparison(full: Reply, reduced: Reply) -> str:
    """One line with what the reduction changed."""
    facts = []
    if full.num_visual_tokens_kept and reduced.num_visual_tokens_kept:
        facts.append(f"Visual tokens <b>{full.num_visual_tokens_kept:,} → {reduced.num_visual_tokens_kept:,}</b>")
    if full.timings_s and reduced.timings_s:
        before, after = (milliseconds(sum(seconds for _, seconds in stages_of(one))) for one in (full, reduced))
        facts.append(f"Total <b>{before} → {after}</b>")
    for stage in ("prefill", "decode"):
        if stage in full.timings_s and stage in reduced.timings_s:
            before, after = milliseconds(full.timings_s[stage]), milliseconds(reduced.timings_s[stage])
            facts.append(f"{stage.capitalize()} <b>{before} → {after}</b>")
    same = full.text.strip() == reduced.text.strip()
    facts.append("<b>Same answer</b>" if same else "<b>The answers differ</b>")
    return f'<div class="mm-sum">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>'


def plain_pictures(preview: Preview, title: str) -> str:
    """What was uploaded, before anything was asked."""
    captions = [f"{time_s:.1f} s" for time_s in preview.timestamps_s] or [""]
    figures = [_figure(url, "", caption) for url, caption in zip(preview.urls, captions, strict=True)]
    return _figures(title, "", figures, preview)


def kept_pictures(preview: Preview, item: KeptMap, title: str) -> str:
    """The pictures with their dropped cells dimmed, and a slider for how much."""
    if item.cubes:
        return cut_clip(preview, item, title)
    if not has_layout(item):
        return error("This model does not say where in the picture its tokens lie.")
    mask = kept_mask(item)
    cells = item.grid[1] * item.grid[2]
    figures = []
    for step, kept in enumerate(mask):
        frame = frame_of_slice(step, len(mask), len(preview.urls))
        time = f"{preview.timestamps_s[frame]:.1f} s · " if preview.timestamps_s else ""
        figures.append(_figure(preview.urls[frame], _shapes(kept), f"{time}{int(kept.sum())} of {cells} kept"))
    slider = (
        '<label>Dim what was dropped<input type="range" min="0" max="1" step="0.01" value="0.78" '
        "oninput=\"this.closest('.mm-figs').style.setProperty('--mm-dim', this.value)\"></label>"
    )
    return _figures(title, slider, figures, preview)


def cut_clip(preview: Preview, item: KeptMap, title: str) -> str:
    """The frames of a clip with a time line below them: the pieces into which it was cut, and when each begins."""
    num_frames, total_s = item.grid[0], max(item.cubes[-1].end_s, 1e-9)
    first = {cube.first_frame: i for i, cube in enumerate(item.cubes, 1)}
    figures: list[str] = []
    for step, url in enumerate(preview.urls):
        frame = step * num_frames // len(preview.urls)
        begins = f" · cube {first[frame]} begins" if frame in first else ""
        figures.append(_figure(url, "", f"{preview.timestamps_s[step]:.1f} s{begins}"))
    pieces = "".join(
        f'<i style="left:{100 * cube.start_s / total_s:.3f}%;width:{100 * (cube.end_s - cube.start_s) / total_s:.3f}%" '
        f'title="cube {i}: {cube.num_frames} frames, {cube.start_s:.1f} s to {cube.end_s:.1f} s">{cube.start_s:.1f}</i>'
        for i, cube in enumerate(item.cubes, 1)
    )
    label = f"{len(item.cubes)} cubes of {num_frames} frames; {len(item.kept)} tokens"
    line = f'<div class="mm-timeline" role="img" aria-label="{label}">{pieces}</div><p class="mm-note">{label}</p>'
    return _figures(title, "", figures, preview).removesuffix("</div>") + f"{line}</div>"


def _figures(title: str, control: str, figures: Sequence[str], preview: Preview) -> str:
    layout = "mm-frames" if preview.timestamps_s else "mm-single"
    head = f"<header><h2>{escape(title)}</h2>{control}</header>" if title else ""
    ratio = f"--mm-ratio: {preview.aspect_ratio:.4f}"
    return f'<div class="mm-figs" style="{ratio}">{head}<div class="{layout}">{"".join(figures)}</div></div>'


def _figure(url: str, shapes: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="mm-pic"><img src="{url}" alt="">{shapes}</div>{below}</figure>'


def _shapes(kept: np.ndarray) -> str:
    h, w = kept.shape
    label = f"{int(kept.sum())} of {h * w} tokens kept"
    return (
        f'<svg viewBox="0 0 {w} {h}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path class="mm-dropped" shape-rendering="crispEdges" d="{dropped_path(kept)}"/>'
        f'<path class="mm-border" d="{border_path(kept)}"/></svg>'
    )
