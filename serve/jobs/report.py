"""The messages of a job, on stderr: a progress bar on a terminal, plain lines elsewhere, and the counts at the end.

rich decides about colours (and honours NO_COLOR). Results are written to the output folder, not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.jobs.job import JobError

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
except ImportError as error:
    raise JobError("captioning needs rich for its progress; install mm-serving[batch]") from error

LINE_INTERVAL_S = 10.0
NUM_FAILURES_SHOWN = 20


@dataclass(kw_only=True)
class Summary:
    """The counts of one run.

    Attributes:
        num_items: Items the inputs name, after the limit; the next six add up to it.
        num_captioned, num_shared: Captioned in this run: by the model, and by an equal file's caption.
        num_failed: Failed in this run.
        num_captioned_before, num_failed_before: Left as earlier runs left them.
        num_remaining: Not reached.
        num_reducer_faults: Captioned in this run with all tokens because the reducer failed.
        skipped: Files of other types, counted by extension.
        problems: Inputs that led nowhere and folders that could not be read.
        num_visual_tokens_in, num_visual_tokens_kept: Sums over what the model captioned in this run.
    """

    num_items: int = 0
    num_captioned: int = 0
    num_shared: int = 0
    num_failed: int = 0
    num_captioned_before: int = 0
    num_failed_before: int = 0
    num_remaining: int = 0
    num_reducer_faults: int = 0
    num_visual_tokens_in: int = 0
    num_visual_tokens_kept: int = 0
    elapsed_s: float = 0.0
    exit_code: int = 0
    out: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def num_failures(self) -> int:
        return self.num_failed + self.num_failed_before

    @property
    def num_done(self) -> int:
        """Items that this run gave a record."""
        return self.num_captioned + self.num_shared + self.num_failed


def shown(text: str) -> str:
    """`text` on one line and without control characters, which a file name or a caption may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Report:
    """Writes the messages of a job."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._bar: tuple[Progress, TaskID] | None = None
        self._started_s = self._last_line_s = time.monotonic()

    def error(self, text: str) -> None:
        self._console.print(f"mm caption: {shown(text)}", style="red")

    def warn(self, text: str) -> None:
        self._console.print(shown(text), style="yellow")

    def info(self, text: str) -> None:
        if not self._quiet:
            self._console.print(shown(text))

    @contextlib.contextmanager
    def progress(self, num_items: int) -> Iterator[None]:
        """Show how far the run is, out of `num_items`, until the block ends."""
        self._started_s = self._last_line_s = time.monotonic()
        if self._quiet or not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        with Progress(TextColumn("captions"), *columns, console=self._console, transient=True) as progress:
            self._bar = progress, progress.add_task("captions", total=num_items, note="")
            try:
                yield
            finally:
                self._bar = None

    def advance(self, summary: Summary) -> None:
        """One more item of this run has its record."""
        now = time.monotonic()
        rate = summary.num_done / max(now - self._started_s, 1e-9)
        if self._bar is not None:
            progress, task = self._bar
            note = f"{rate:.1f}/s  {_kept(summary)}" + (f"  {summary.num_failed} failed" if summary.num_failed else "")
            progress.update(task, completed=summary.num_done, note=note)
        elif now - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = now
            left_s = summary.num_remaining / rate
            self.info(
                f"{summary.num_done} done, {summary.num_failed} of them failed; {summary.num_remaining} to go, "
                f"{rate:.1f}/s, about {left_s:.0f} s left; {_kept(summary)}"
            )

    def failed(self, path: str, reason: str) -> None:
        """An item has just failed; the end of the job lists it again."""
        self.info(f"failed: {path}: {reason}")

    def failures(self, records: Iterator[Mapping[str, Any]], num_failures: int, file: str) -> None:
        """List failed items with their reasons; many of them only in part."""
        self.warn(f"{num_failures} {'item' if num_failures == 1 else 'items'} failed:")
        for _, record in zip(range(NUM_FAILURES_SHOWN), records, strict=False):
            self.warn(f"  {record['path']}: {record['reason']} [{record['code']}]")
        if num_failures > NUM_FAILURES_SHOWN:
            self.warn(f"  and {num_failures - NUM_FAILURES_SHOWN} more in {file}")
        self.info("add --retry-failed to try them again")

    def end(self, summary: Summary, *, as_json: bool) -> None:
        """The counts, and on request the same as one JSON line on stdout."""
        before = f", {summary.num_captioned_before} had a caption already" if summary.num_captioned_before else ""
        faults = f", {summary.num_reducer_faults} with all tokens as the reducer failed"
        faults = faults if summary.num_reducer_faults else ""
        remaining = f", {summary.num_remaining} not reached" if summary.num_remaining else ""
        self.info(
            f"{summary.num_captioned + summary.num_shared} captioned ({summary.num_shared} as equal files){faults}, "
            f"{summary.num_failures} failed{before}{remaining}; {_kept(summary)}; {summary.elapsed_s:.1f} s; "
            f"results in {summary.out}"
        )
        if as_json:
            sys.stdout.write(json.dumps(dataclasses.asdict(summary)) + "\n")
            sys.stdout.flush()


def _kept(summary: Summary) -> str:
    if not summary.num_visual_tokens_in:
        return "no visual tokens"
    share = summary.num_visual_tokens_kept / summary.num_visual_tokens_in
    return f"kept {summary.num_visual_tokens_kept} of {summary.num_visual_tokens_in} visual tokens ({share:.0%})"
