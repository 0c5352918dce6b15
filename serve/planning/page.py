"""A plan as one HTML file with plots, which needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from serve.planning.figures import ATTAINMENT
from serve.planning.planner import Plan
from serve.planning.report import text

WIDTH, ROW, LABEL = 860, 20, 190
NUM_SHOWN = 30
COLOURS = ("#00796b", "#4db6ac", "#b2dfdb")
STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "pre{overflow-x:auto;background:#f4f4f4;padding:1em}text{font:12px system-ui,sans-serif}"
)


def page(plan: Plan) -> str:
    """The file."""
    shown = plan.candidates[:NUM_SHOWN]
    names = [one.layout.name for one in shown]
    good = [[(one.goodput or 0.0) * plan.scale(one, at_cost=one.price is not None)] for one in shown]
    ttft = [[f.p50, f.p90, f.p99] for f in (one.figures.ttft_s for one in shown)]
    tpot = [[f.p50, f.p90, f.p99] for f in (one.figures.tpot_s for one in shown)]
    what = "the fleet's price" if shown[0].price is not None else "the fleet's number of GPUs"
    plots = [
        bars(f"Goodput at {ATTAINMENT:.0%} attainment for {what}, requests/s", names, good, ("goodput",)),
        bars("TTFT at the rate asked for, seconds", names, ttft, ("p50", "p90", "p99"), mark=plan.targets.ttft_s),
        bars("TPOT at the rate asked for, seconds", names, tpot, ("p50", "p90", "p99"), mark=plan.targets.tpot_s),
    ]
    costs = [one.cost_per_1000(one.goodput) for one in shown]
    if any(cost is not None for cost in costs):
        plots.append(bars("Cost of 1,000 requests at goodput", names, [[cost or 0.0] for cost in costs], ("cost",)))
    body = f"<h1>Plan</h1><pre>{html.escape(text(plan))}</pre>{''.join(plots)}"
    return f'<!doctype html><meta charset="utf-8"><title>mm plan</title><style>{STYLE}</style>{body}\n'


def bars(
    title: str,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    series: Sequence[str],
    mark: float | None = None,
) -> str:
    """A bar chart as SVG, one row per name with one bar per series.

    Args:
        mark: A value at which a line is drawn; bars longer than five times it are cut off and say so.
    """
    known = [value for row in values for value in row if value == value]
    most = max([*known, mark or 0.0, 1e-12])
    if mark is not None:
        most = min(most, 5 * mark)
    thick, room = ROW / len(series) - 1, WIDTH - LABEL - 90
    parts = list[str]()
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        top = 8 + i * (ROW + 6)
        parts.append(f'<text x="{LABEL - 8}" y="{top + ROW * 0.7:.0f}" text-anchor="end">{html.escape(name)}</text>')
        for k, value in enumerate(row):
            if value != value:
                continue
            y, length = top + k * (thick + 1), room * min(value, most) / most
            parts.append(
                f'<rect x="{LABEL}" y="{y:.1f}" width="{length:.1f}" height="{thick:.1f}" fill="{COLOURS[k]}">'
                f"<title>{html.escape(name)} {series[k]}: {value:.4g}</title></rect>"
            )
        last = next((value for value in reversed(row) if value == value), None)
        if last is not None:
            more = " (cut)" if last > most else ""
            x = LABEL + room * min(last, most) / most + 6
            parts.append(f'<text x="{x:.0f}" y="{top + ROW * 0.85:.0f}">{last:.3g}{more}</text>')
    height = 16 + len(names) * (ROW + 6)
    if mark is not None:
        x = LABEL + room * mark / most
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c62828" stroke-dasharray="4 3"/>')
    legend = ", ".join(f'<span style="color:{COLOURS[k]}">■</span> {name}' for k, name in enumerate(series))
    line = ' <span style="color:#c62828">┆</span> target' if mark is not None else ""
    return (
        f"<h2>{html.escape(title)}</h2><p>{legend}{line}</p>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
