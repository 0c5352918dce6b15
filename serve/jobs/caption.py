"""`mm caption`: every image and clip of some folders to one line of JSON each.

    run_caption(CaptionJob(inputs=("photos",), out=Path("captions")))

Exit codes: 0 when every item has its caption; 3 when the job is finished but some items failed or an input could not be
read; 1 when nothing could run, or the model failed on one item after the other; 130 after Ctrl-C and 143 after SIGTERM,
each once the items that were begun are written.

A job is resumed by running it again. Items are recognised by path. A finished one is left alone as long as its file
has the size and time it had, or else the same content; a file that changed is done again and its old record goes.
Failed items are left alone too, unless their file changed or `retry_failed` is set. Files of equal content share the
caption of the first of them, each with a line of its own. Records of files that are no longer among the inputs stay.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.batch import Gathering
from mm.errors import MmError
from serve.jobs.captioner import (
    Begun,
    Captioner,
    Failure,
    Loaded,
    LocalCaptioner,
    Record,
    begin,
    complete,
    failure_record,
    load,
)
from serve.jobs.discover import Found, Item, find_items
from serve.jobs.flow import Stop, prefetched, stopping
from serve.jobs.job import CaptionJob, JobError, settings_of
from serve.jobs.plan import Plan, make_plan
from serve.jobs.report import Report, Summary
from serve.jobs.results import Journal, OutputFolder, discard, locked, open_output

MAX_FAULTS_IN_A_ROW = 5
"""The job ends after this many failures in a row that are not due to the items: further ones would fail as well."""

Build = Callable[[CaptionJob], Captioner]


def run_caption(job: CaptionJob, *, build: Build = LocalCaptioner.build) -> int:
    """Run a job to its end, or on from where an earlier run stopped.

    Args:
        build: Loads the model; called only when there is something to do.

    Returns:
        The exit code; see the module docstring. Errors have been reported.
    """
    report = Report(quiet=job.quiet)
    try:
        with stopping() as stop:
            summary = _run(job, build, report, stop)
    except MmError as error:
        report.error(str(error))
        return 1
    except OSError as error:
        report.error(f"cannot go on: {error.filename or job.out}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        report.warn("stopped at once; run the same command again to go on")
        return 128 + signal.SIGINT
    report.end(summary, as_json=job.as_json)
    return summary.exit_code


def _run(job: CaptionJob, build: Build, report: Report, stop: Stop) -> Summary:
    start = time.monotonic()
    found = find_items(job.inputs, job.patterns, exclude=str(job.out))
    items = found.items[: job.limit]
    _report_found(found, report)
    if not items:
        raise JobError("no images or clips were found in: " + ", ".join(job.inputs))
    settings = settings_of(job)
    with locked(job.out):
        captioner = build(job) if job.restart else None
        if job.restart:
            discard(job.out)  # only now that the model is known to work
        with open_output(job.out, settings) as output:
            plan = make_plan(items, output, job.model.limits, retry_failed=job.retry_failed)
            summary = _summary(job, found, plan)
            if plan.pending:
                report.info(f"{len(plan.pending)} of {summary.num_items} items to do with {job.model.model}")
                captioner = captioner or build(job)
                output.begin(job.inputs, plan.drop)
                run = _Run(job=job, captioner=captioner, output=output, report=report, summary=summary, stop=stop)
                run.work(plan.pending)
            _report_failures(items, output.failures, summary, report)
    summary.elapsed_s = round(time.monotonic() - start, 3)
    summary.exit_code = _exit_code(summary, stop)
    return summary


def _report_found(found: Found, report: Report) -> None:
    for problem in found.problems:
        report.warn(problem)
    if found.skipped:
        counts = ", ".join(f"{name} {count}" for name, count in found.skipped.most_common(8))
        report.info(f"skipped {found.skipped.total()} files that are no images or clips by their names: {counts}")


def _summary(job: CaptionJob, found: Found, plan: Plan) -> Summary:
    return Summary(
        num_items=len(plan.pending) + plan.num_captioned + plan.num_failed,
        num_captioned_before=plan.num_captioned,
        num_failed_before=plan.num_failed,
        num_remaining=len(plan.pending),
        out=str(job.out),
        skipped=dict(found.skipped),
        problems=found.problems,
    )


def _exit_code(summary: Summary, stop: Stop) -> int:
    if summary.num_remaining:
        return 1 if stop.signal is None else 128 + stop.signal
    return 3 if summary.num_failures or summary.problems else 0


def _report_failures(items: list[Item], failures: Journal, summary: Summary, report: Report) -> None:
    """List the failures of this run's items, those of earlier runs included."""
    if summary.num_failures:
        asked = {item.path for item in items}
        records = (failures.read(path) for path in failures.entries if path in asked)
        report.failures(records, summary.num_failures, str(failures.path))


@dataclass(kw_only=True)
class _Run:
    """The work on one plan."""

    job: CaptionJob
    captioner: Captioner
    output: OutputFolder
    report: Report
    summary: Summary
    stop: Stop
    num_faults_in_a_row: int = 0
    begun: deque[Begun] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.gathering = Gathering(self.job.num_together)

    def work(self, pending: list[Item]) -> None:
        ahead = self.job.num_prefetch
        loaded = prefetched(pending, self._load, ahead, self.captioner.prepare_thread, self._advance, self._patience_s)
        with contextlib.closing(loaded), self.report.progress(len(pending)):
            self._drain(loaded)
        if self._has_failed:
            self.report.error(f"stopped: {MAX_FAULTS_IN_A_ROW} items in a row failed, and not because of the items")
        elif self.stop and self.summary.num_remaining:
            self.report.warn(f"stopped with {self.summary.num_remaining} to go; run the same command again to go on")

    def _load(self, item: Item) -> Loaded:
        known = self.output.captions.hash_to_path.__contains__
        return self.gathering.timed(lambda: load(item, self.job, self.captioner, known))

    def _patience_s(self) -> float | None:
        """How long the engine waits for the next item before it steps."""
        return self.gathering.wait_s(sum(not one.is_done for one in self.begun))

    def _drain(self, loaded: Iterator[Loaded]) -> None:
        """Begin items as they are loaded, `num_together` at a time, and write each when it is done, in order."""
        for one in loaded:
            if self.stop:  # it may have been set while this item was loaded
                break
            self.begun.append(self._begin(one))
            self._write_done()
            while len(self.begun) >= self.job.num_together and not self._has_failed:
                self._advance()
            if self.stop or self._has_failed:
                break
        while self.begun and not self._has_failed:
            self._advance()

    def _begin(self, loaded: Loaded) -> Begun:
        known = loaded.content_hash in self.output.captions.hash_to_path
        under_way = any(begun.loaded.content_hash == loaded.content_hash for begun in self.begun)
        # An item without a hash could not be read and has failed.
        return Begun(loaded=loaded) if known or under_way else begin(loaded, self.captioner)

    def _advance(self) -> bool:
        did_something = self.captioner.step()
        self._write_done()
        return did_something

    def _write_done(self) -> None:
        while self.begun and self.begun[0].is_done and not self._has_failed:
            self._finish(self.begun.popleft())

    @property
    def _has_failed(self) -> bool:
        return self.num_faults_in_a_row >= MAX_FAULTS_IN_A_ROW

    def _finish(self, begun: Begun) -> None:
        loaded = begun.loaded
        outcome = complete(begun, self.job.model.model, self.captioner, self._equal(loaded))
        if isinstance(outcome, Failure):
            self._note_failure(loaded, outcome)
        else:
            self.output.captions.append(outcome)
            self._count(outcome)
            self.num_faults_in_a_row = 0
        self.summary.num_remaining -= 1
        self.report.advance(self.summary)

    def _equal(self, loaded: Loaded) -> Mapping[str, Any] | None:
        path = self.output.captions.hash_to_path.get(loaded.content_hash or "")
        return None if path is None else self.output.captions.read(path)

    def _count(self, record: Record) -> None:
        self.summary.num_reducer_faults += "reducer_faults" in record
        if "same_as" in record:
            self.summary.num_shared += 1
            return
        self.summary.num_captioned += 1
        self.summary.num_visual_tokens_in += record["num_visual_tokens_in"]
        self.summary.num_visual_tokens_kept += record["num_visual_tokens_kept"]

    def _note_failure(self, loaded: Loaded, failure: Failure) -> None:
        self.output.failures.append(failure_record(loaded, failure))
        self.report.failed(loaded.item.path, failure.reason)
        self.summary.num_failed += 1
        self.num_faults_in_a_row = self.num_faults_in_a_row + 1 if failure.is_fault else 0


__all__ = ["CaptionJob", "run_caption"]
