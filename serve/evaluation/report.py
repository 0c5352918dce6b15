"""The output of an evaluation: progress on stderr, tables in Markdown on stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serve.evaluation.run import Advance

LINE_INTERVAL_S = 20.0


@contextlib.contextmanager
def progress(total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """A function to call after each answer: it moves a bar on a terminal, and writes lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if quiet:
        yield lambda: None
    elif console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("questions"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("questions", total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(total)


class _Lines:
    """Progress for a log."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start_s = self._printed_s = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._printed_s < LINE_INTERVAL_S:
            return
        self._printed_s = now
        left_s = (now - self._start_s) / self._done * (self._total - self._done)
        sys.stderr.write(f"{self._done} of {self._total} questions, about {left_s:.0f} s left\n")
        sys.stderr.flush()


def tables(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows, columns = result["rows"], result["columns"]
    data, backend = result["data"], result["answerer"]
    asked = f"{data['num_items']} questions on {data['num_media']} media of {data['name']} ({data['sha256'][:12]})"
    head = f"{backend['model']} through {backend['through']}: {asked}."
    parts = [head, _tasks(rows, columns), NOTE]
    if any(row["group"].startswith("objects=") for row in rows):
        parts += ["By number of objects:", _by_objects(rows, columns)]
    return "\n\n".join(parts)


NOTE = (
    "Right answers with 95 % bootstrap intervals over media; swapped: the same questions about another item's medium, "
    "whose answers do not come from what the medium shows."
)


def _tasks(rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]]) -> str:
    header = ["task", "wording", "items"]
    for column in columns:
        kept = "" if column["kept_share"] is None else f" (kept {column['kept_share']:.0%})"
        header += [f"{column['reducer'] or 'default'}{kept}", "95 %", "swapped"]
    lines = []
    for row in rows:
        if row["group"].startswith("objects="):
            continue
        line = [row["task"], row["group"], str(row["items"])]
        for cell in row["cells"]:
            line += [
                f"{cell['exact']:.2f}",
                _span(cell),
                f"{cell['swapped']['exact']:.2f}" if "swapped" in cell else "-",
            ]
        lines.append(line)
    return markdown(header, lines)


def _by_objects(rows: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        if row["group"].startswith("objects="):
            number = row["group"].removeprefix("objects=")
            for i, cell in enumerate(row["cells"]):
                cells.setdefault((row["task"], i), {})[number] = f"{cell['exact']:.2f} of {row['items']}"
    found = {number for by_number in cells.values() for number in by_number}
    numbers = sorted(found, key=lambda number: (number.endswith("+"), int(number.removesuffix("+"))))
    several = len(columns) > 1
    header = ["task", *(["reducer"] if several else []), *numbers]
    lines = []
    for (task, i), by_number in cells.items():
        reducer = [columns[i]["reducer"] or "default"] if several else []
        lines.append([task, *reducer, *(by_number.get(n, "") for n in numbers)])
    return markdown(header, lines)


def _span(cell: Mapping[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{low:.2f}-{high:.2f}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in [header, rule, *lines]
    )
