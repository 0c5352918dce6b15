"""What a run of a job did, as one HTML file with plots that needs no network and no script."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from serve.jobs.batch.progress import Counts
from serve.jobs.batch.sinks import Record

SUMMARY = "summary.html"
MAX_POINTS = 400
NUM_SHOWN = 50
"""Failures that are listed; all of them are in their file."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 64, 34, 12
NUM_BARS = 24
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--fill:#0a5fb4;--bad:#b3261e;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa6b2;--line:#3d444d;--fill:#6cb2f7;--bad:#ff8a80;
--page:#0d1117}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:44rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.25rem 0}small,.soft{color:var(--soft)}
dl{display:flex;flex-wrap:wrap;gap:1rem 2rem;margin:1.5rem 0}dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.4rem;font-weight:600}svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;vertical-align:top;padding:.3rem .5rem;
border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:600}div.wide{overflow-x:auto}
td:nth-child(5){min-width:14rem}
"""


@dataclass
class History:
    """How a run went on: at most MAX_POINTS points in time, and how long answers were."""

    points: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    lengths: Counter[int] = field(default_factory=Counter[int])
    _step_s: float = 0.05

    def note(self, elapsed_s: float, num_rows: int, length: int | None) -> None:
        """One more row after so many seconds; `length` is that of an answer of the model, in tokens."""
        if length is not None:
            self.lengths[length] += 1
        if elapsed_s - self.points[-1][0] >= self._step_s:
            self.points.append((elapsed_s, num_rows))
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]
            self._step_s *= 2


def summary_page(
    counts: Counts,
    failed: Iterable[Record],
    history: History,
    settings: Mapping[str, Any],
    elapsed_s: float,
    ended: str,
) -> str:
    """The page.

    Args:
        failed: The failures that stand, those of earlier runs included.
        elapsed_s: Of the run, without loading the model.
        ended: How it ended, in words.
    """
    failures = list(failed)
    codes = Counter(f"{failure['stage']}: {failure['code']}" for failure in failures).most_common(12)
    sections = [
        ("Rows over time", lines([*history.points, (elapsed_s, counts.now)], "seconds", "rows of this run")),
        ("Length of answers", columns(history.lengths, "tokens", "answers")),
        ("Failures by cause", bars(codes)),
        ("Failures", _failures(failures)),
        ("Settings", _table(("setting", "value"), [(key, _shown(value)) for key, value in settings.items()])),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    done = f"{counts.done + counts.shared + counts.done_before:,}"
    of = "" if counts.total is None else f" of {counts.total:,}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{done}{of} rows answered</title><style>{STYLE}</style><h1>{done}{of} rows answered, "
        f'{len(failures):,} failed</h1><p class="soft">{escape(ended)}</p>{_facts(counts, elapsed_s)}{body}</html>\n'
    )


def _facts(counts: Counts, elapsed_s: float) -> str:
    rate = counts.now / elapsed_s if elapsed_s > 0 else 0.0
    facts = {
        "rows per second": f"{rate:.1f}",
        "seconds": f"{elapsed_s:,.1f}",
        "answered by the model": f"{counts.done:,}",
        "as equal rows": f"{counts.shared:,}",
        "answered before": f"{counts.done_before:,}",
    }
    if counts.num_visual_tokens_in:
        facts["visual tokens kept"] = f"{counts.num_visual_tokens_kept / counts.num_visual_tokens_in:.0%}"
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts.items())}</dl>"


def _failures(failures: Sequence[Record]) -> str:
    if not failures:
        return ""
    names = ("id", "stage", "code", "attempts", "message")
    rows = [tuple(_shown(failure[name]) for name in names) for failure in failures[:NUM_SHOWN]]
    more = len(failures) - len(rows)
    return _table(names, rows) + (f"<p><small>and {more:,} more in failures.jsonl</small></p>" if more else "")


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines_ = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines_}</table></div>'


def lines(points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """A line through points (x, y), both from 0."""
    most_x, most_y = max(x for x, _ in points), max(y for _, y in points)
    if not most_x or not most_y:
        return ""
    path = " ".join(f"{_x(x, most_x):.1f},{_y(y, most_y):.1f}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="var(--fill)" stroke-width="2"/>'
    return _plot(line, most_x, most_y, across, up)


def columns(counted: Mapping[int, int], across: str, up: str) -> str:
    """How often each whole number was counted, in at most NUM_BARS columns of equal width."""
    if not counted:
        return ""
    width = max(1, math.ceil((max(counted) + 1) / NUM_BARS))
    sums = Counter[int]()
    for value, count in counted.items():
        sums[value // width] += count
    most_x, most_y = (max(sums) + 1) * width, max(sums.values())
    parts: list[str] = []
    for i, count in sorted(sums.items()):
        left, right = _x(i * width, most_x), _x((i + 1) * width, most_x)
        top = _y(count, most_y)
        shape = f'x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
        parts.append(f'<rect {shape} fill="var(--fill)"><title>{count:,}</title></rect>')
    return _plot("".join(parts), most_x, most_y, across, up)


def bars(counted: Sequence[tuple[str, int]]) -> str:
    """A bar for each name."""
    most = max((count for _, count in counted), default=0)
    rows = [
        f"<tr><td>{escape(name)}</td><td style='width:50%'><div style='background:var(--bad);height:.9rem;"
        f"margin-top:.3rem;width:{count / most:.1%}'></div></td><td>{count:,}</td></tr>"
        for name, count in counted
    ]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>' if rows else ""


def _x(value: float, most: float) -> float:
    return LEFT + value / most * (WIDTH - LEFT - 16)


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - value / most * (HEIGHT - BOTTOM - TOP)


def _plot(drawn: str, most_x: float, most_y: float, across: str, up: str) -> str:
    """A plot with its axes; `drawn` is inside."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(up)} by {escape(across)}">']
    for tick in _ticks(most_y):
        y = _y(tick, most_y)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 16}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in _ticks(most_x):
        x = _x(tick, most_x)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:,g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    return "".join([*parts, drawn, "</svg>"])


def _ticks(most: float) -> list[float]:
    """About four round numbers from 0 to `most`."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 > most)
    return [round(i * step, 10) for i in range(int(most / step + 1e-9) + 1)]
