"""How far a job is: one line of at most 80 columns on a terminal, a line now and then elsewhere, or lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TextIO

WIDTH = 80
LINE_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.2
WINDOW_S = 30.0
"""The rate is that of the last so many seconds."""


@dataclass(kw_only=True)
class Counts:
    """The counts of one run.

    Attributes:
        total: Rows of the inputs; None while that is not known.
        done: Answered in this run by the model; `shared` by the answer of an equal row.
        failed: Failed in this run; `failed_before` in earlier ones, and not tried again.
        done_before: Answered in earlier runs.
        skipped: Left out, as they have a file already.
    """

    total: int | None = None
    done: int = 0
    shared: int = 0
    failed: int = 0
    done_before: int = 0
    failed_before: int = 0
    skipped: int = 0
    num_visual_tokens_in: int = 0
    num_visual_tokens_kept: int = 0

    @property
    def seen(self) -> int:
        """Rows that need nothing any more."""
        return self.now + self.done_before + self.failed_before + self.skipped

    @property
    def now(self) -> int:
        """Rows of this run."""
        return self.done + self.shared + self.failed


class Progress:
    """Shows the counts.

    Args:
        as_json: Lines of JSON in place of text.
        quiet: Nothing.
    """

    def __init__(
        self, counts: Counts, *, quiet: bool = False, as_json: bool = False, out: TextIO | None = None
    ) -> None:
        self._counts, self._quiet, self._as_json, self._out = counts, quiet, as_json, out or sys.stderr
        self.begin()

    def begin(self) -> None:
        """The work begins now; loading a model before it does not count."""
        self._last = time.monotonic()
        self._marks: list[tuple[float, int]] = [(self._last, self._counts.now)]

    @property
    def _is_terminal(self) -> bool:
        return self._out.isatty() and not self._as_json

    def advance(self) -> None:
        """The counts have changed."""
        now = time.monotonic()
        if self._quiet or now - self._last < (BAR_INTERVAL_S if self._is_terminal else LINE_INTERVAL_S):
            return
        self._show(now)

    def _show(self, now: float) -> None:
        self._last = now
        text = self.line(now)
        end = "\r" if self._is_terminal else "\n"
        self._out.write((text.ljust(WIDTH - 1) if self._is_terminal else text) + end)
        self._out.flush()

    def rate(self, now: float) -> float:
        """Rows of this run in a second, of late."""
        self._marks = [mark for mark in self._marks if now - mark[0] <= WINDOW_S] or self._marks[-1:]
        then, count = self._marks[0]
        rate = (self._counts.now - count) / max(now - then, 1e-9)
        if now - self._marks[-1][0] > 1.0:
            self._marks.append((now, self._counts.now))
        return rate

    def line(self, now: float) -> str:
        """The line of text, or the JSON object."""
        counts, rate = self._counts, self.rate(now)
        left = None if counts.total is None else max(0, counts.total - counts.seen)
        eta = None if left is None or not rate else left / rate
        if self._as_json:
            fields = asdict(counts) | {"seen": counts.seen}
            return json.dumps(fields | {"rate": round(rate, 3), "eta_s": None if eta is None else round(eta, 1)})
        of = "" if counts.total is None else f"/{counts.total:,}"
        failed = counts.failed + counts.failed_before
        parts = [f"{counts.seen:,}{of}", f"{rate:.1f}/s", f"{failed:,} failed", f"ETA {_clock(eta)}"]
        if counts.num_visual_tokens_in:
            parts.append(f"kept {counts.num_visual_tokens_kept / counts.num_visual_tokens_in:.0%} of visual tokens")
        return "  ".join(parts)[: WIDTH - 1]

    def end(self) -> None:
        """Show the last counts."""
        if not self._quiet:
            self._show(time.monotonic())
            if self._is_terminal:
                self._out.write("\n")


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
