"""Runs a job over rows: reads, asks, and keeps each answer as it comes; run it again to go on.

Exit codes: 0 when every row has its answer; 3 when the job is finished but rows failed; 1 when it cannot go on; 130
after Ctrl-C and 143 after SIGTERM, once what was begun is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mm.errors import MmError
from serve.jobs.batch.answering import Answerer, answerer
from serve.jobs.batch.asking import AskError
from serve.jobs.batch.equal import Asked, Content
from serve.jobs.batch.job import BatchJob
from serve.jobs.batch.progress import Counts, Progress
from serve.jobs.batch.rows import BadRow, Row
from serve.jobs.batch.sinks import MEDIA, SINKS, Record, Sidecars, write_atomically
from serve.jobs.batch.sources import Source
from serve.jobs.batch.store import FAILURES, MANIFEST, PENDING, Store
from serve.jobs.batch.summary import SUMMARY, History, summary_page
from serve.jobs.batch.windows import Windows
from serve.jobs.flow import Stop, stopping
from serve.jobs.results import locked

MAX_FAULTS_IN_A_ROW = 8
"""The job ends after this many failures in a row that are not due to the rows: further ones would fail as well."""
WORK_FOLDER = ".mm"
"""Where the records of a job with files beside the media are."""


def run_batch(job: BatchJob) -> int:
    """Run a job to its end, or on from where an earlier run stopped. Returns the exit code; errors are reported."""
    try:
        with stopping() as stop:
            return asyncio.run(_run(job, stop))
    except MmError as error:
        _say(job, str(error))
        return 1
    except OSError as error:
        _say(job, f"cannot go on: {error.filename or job.out}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        _say(job, "stopped at once; run the same command again to go on")
        return 128 + signal.SIGINT


def _say(job: BatchJob, text: str) -> None:
    sys.stderr.write(f"mm {job.name}: {text}\n")


async def _run(job: BatchJob, stop: Stop) -> int:
    source = Source(inputs=job.inputs, columns=job.columns, patterns=job.patterns, exclude=str(job.out))
    total = source.count() if job.window_s is None else None  # windows are known when a clip is read
    counts = Counts(total=total if total is None or job.limit is None else min(total, job.limit))
    beside = job.form in ("txt", "json")
    folder = job.out / WORK_FOLDER if beside else job.out
    start = time.monotonic()
    with locked(folder):
        if job.restart:
            _discard(folder)
        store = Store(folder=folder, sink=SINKS[job.form](), settings=job.settings(), shard_rows=job.shard_rows)
        run = _Run(
            job=job, store=store, counts=counts, stop=stop, sidecars=Sidecars(job.out, job.form) if beside else None
        )
        for record in store.open():
            run.remember(record)
        try:
            await run.work(source)
        finally:
            store.close()
    run.progress.end()
    _write_summary(run, folder)
    return _report(run, time.monotonic() - start)


def _write_summary(run: _Run, folder: Any) -> None:
    if not run.counts.now and (folder / SUMMARY).exists():
        return  # an earlier run has more to show
    ended = "finished" if run.is_whole else "stopped before its end; run the same command again to go on"
    failed, settings = run.store.failed.values(), run.job.settings()
    page = summary_page(run.counts, failed, run.history, settings, time.monotonic() - run.began, ended)
    write_atomically(folder / SUMMARY, page.encode("utf-8", "backslashreplace"))


def _discard(folder: Any) -> None:
    """Delete the results in a locked folder that has a manifest."""
    if not (folder / MANIFEST).exists():
        return
    for path in folder.iterdir():
        if path.name.startswith(("part-", ".part-")) or path.name in (MANIFEST, FAILURES, PENDING, SUMMARY):
            path.unlink()


def _report(run: _Run, elapsed_s: float) -> int:
    counts, job = run.counts, run.job
    failed = len(run.store.failed)
    code = 3 if failed else 0
    if run.ended_by_faults:
        _say(job, f"stopped: {MAX_FAULTS_IN_A_ROW} rows in a row failed, and not because of the rows: {run.last_fault}")
        code = 1
    elif run.stop.signal is not None:
        _say(job, "stopped; run the same command again to go on")
        code = 128 + run.stop.signal
    if failed and not job.quiet:
        first = next(iter(run.store.failed.values()))
        _say(
            job,
            f"{failed} rows failed, such as {first['id']!r}: {first['message']} [{first['code']}]; "
            f"see {run.store.folder / FAILURES}, and add --retry-failed to try them again",
        )
    if job.as_json:
        summary = asdict(counts) | {"elapsed_s": round(elapsed_s, 3), "failures": failed, "exit_code": code}
        sys.stdout.write(json.dumps(summary | {"out": str(job.out)}) + "\n")
    elif not job.quiet:
        _say(
            job,
            f"{counts.done + counts.shared} answered ({counts.shared} as equal rows), {counts.done_before} before, "
            f"{failed} failed, in {elapsed_s:.1f} s; results in {job.out}",
        )
    return code


@dataclass(kw_only=True)
class _Run:
    """The work of one run."""

    job: BatchJob
    store: Store
    counts: Counts
    stop: Stop
    sidecars: Sidecars | None
    seen: set[str] = field(default_factory=set[str])
    files: dict[str, str] = field(default_factory=dict[str, str])
    earlier_failures: dict[str, Record] = field(default_factory=dict[str, Record])
    num_faults_in_a_row: int = 0
    last_fault: str = ""
    is_id_text: bool | None = None
    history: History = field(default_factory=History)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        job = self.job
        self.asked = Asked(dedup=job.dedup, limits=job.model.limits)
        self.progress = Progress(self.counts, quiet=job.quiet, as_json=job.progress_json)

    @property
    def ended_by_faults(self) -> bool:
        return self.num_faults_in_a_row >= MAX_FAULTS_IN_A_ROW

    @property
    def is_whole(self) -> bool:
        """Whether nothing ended the run before its time."""
        return not self.stop and not self.ended_by_faults

    def remember(self, record: Record) -> None:
        """A record of an earlier run: its answer serves equal rows."""
        if self.job.form != "openai":
            self.is_id_text = isinstance(record["id"], str)
            self.asked.remember(record)

    async def work(self, source: Source) -> None:
        if self.job.retry_failed:
            self.earlier_failures = self.store.forget_failures()
        found, job = source.rows(), self.job
        if job.window_s is not None:
            found = Windows(window_s=job.window_s, model=job.model, is_done=self._is_settled).rows(found)
        rows = self._pending(found)
        first = await asyncio.to_thread(next, rows, None)
        if first is None:
            return
        async with answerer(self.job, lambda text: _say(self.job, text)) as asker:
            self.progress.begin()
            self.began = time.monotonic()
            lock = asyncio.Lock()
            waiting: list[Row] = [first]

            async def worker() -> None:
                while not self.stop and not self.ended_by_faults:
                    async with lock:
                        row = waiting.pop() if waiting else await asyncio.to_thread(next, rows, None)
                    if row is None:
                        return
                    await self._do(row, asker)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.job.num_together):
                        group.create_task(worker())
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    def _pending(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that have no record; their ids are checked."""
        for number, row in enumerate(rows):
            if self.job.limit is not None and number >= self.job.limit:
                return
            if row.key in self.seen:
                row = Row(
                    id=f"{row.source}#{number}",
                    source=row.source,
                    problem=f"its id {row.key} is that of an earlier row",
                )
            self.seen.add(row.key)
            row = self._checked_file(row)
            if row.key in self.store.done:
                self.counts.done_before += 1
            elif row.key in self.store.failed:
                self.counts.failed_before += 1
            elif self._has_file(row):
                self.counts.skipped += 1
            else:
                yield row

    def _checked_file(self, row: Row) -> Row:
        """The row, or its problem where its file would be that of an earlier one."""
        if self.sidecars is None:
            return row
        path = str(self.sidecars.path_of(row.id))
        owner = self.files.setdefault(path, row.key)
        what = f"its file {path} is that of the row {owner} already; give ids that differ in more than the ending"
        return row if owner == row.key else replace(row, problem=what)

    def _is_settled(self, key: str) -> bool:
        """Whether a row has its record, or its failure and is not tried again."""
        return key in self.store.done or key in self.store.failed

    def _has_file(self, row: Row) -> bool:
        return self.job.skip_existing and self.sidecars is not None and self.sidecars.path_of(row.id).exists()

    async def _do(self, row: Row, asker: Answerer) -> None:
        """Answer one row and keep what came of it."""
        try:
            if row.problem:
                raise BadRow(row.problem)
            if (row.body is not None) != (self.job.form == "openai"):
                what = "is a request of a batch" if row.body is not None else "is no request of a batch"
                raise BadRow(f"it {what}, which does not go with the form {self.job.form}; see --to")
            if row.body is not None:
                self._keep(await asker.batch_record(row))
                return
            self._check_id(row)
            media = tuple([await asyncio.to_thread(medium.loaded) for medium in row.media])
            await self._answer(replace(row, media=media), asker)
        except BadRow as error:
            self._fail(row, "load", error.code, str(error), 1, is_fault=False)
        except AskError as error:
            self._fail(row, error.stage, error.code, error.message, error.attempts, is_fault=error.is_fault)

    def _check_id(self, row: Row) -> None:
        """Parquet has columns of one type."""
        is_text = isinstance(row.id, str)
        if self.is_id_text is None:
            self.is_id_text = is_text
        if self.job.form == "parquet" and is_text != self.is_id_text:
            raise BadRow(f"its id {row.key} is a {'text' if is_text else 'number'}, and those before it are not")

    async def _answer(self, row: Row, asker: Answerer) -> None:
        content = await asyncio.to_thread(self.asked.content, row)
        known = self.asked.find(content)
        if known is not None:
            with contextlib.suppress(AskError, BadRow):  # where the equal row failed, this one is asked for itself
                equal = await asyncio.shield(known[0])
                self._keep_shared(equal, row, content, known[1])
                return
        row = replace(row, facts={**row.facts, **self.asked.facts(content, None)})
        future = self.asked.begin(content)
        try:
            record = await asker.record(row, content.name)
        except BaseException as error:
            self.asked.failed(content)
            future.set_exception(error if isinstance(error, AskError) else BadRow("the equal row was not answered"))
            raise
        future.set_result(record)
        self._keep(self._with_media(record, row))

    def _keep_shared(self, equal: Record, row: Row, content: Content, bits_apart: int) -> None:
        """Keep the answer to an equal row as this one's."""
        own = {"id": row.id, "source": row.source, **row.facts, **self.asked.facts(content, bits_apart)}
        same = {**equal, **own, "content_hash": content.name, "same_as": equal["id"]}
        self._keep(self._with_media(same, row), is_shared=True)

    def _with_media(self, record: Record, row: Row) -> Record:
        if not self.store.sink.needs_media:
            return record
        endings = [os.path.splitext(medium.path or "")[1].lstrip(".") for medium in row.media]
        named = [
            ending or ("jpg" if medium.kind == "image" else "mp4")
            for ending, medium in zip(endings, row.media, strict=True)
        ]
        data = [(ending, medium.data or b"") for ending, medium in zip(named, row.media, strict=True)]
        return {**record, MEDIA: data}

    def _keep(self, record: Record, *, is_shared: bool = False) -> None:
        if self.sidecars is not None:
            texts = {prompt.name: record[prompt.name] for prompt in self.job.prompts}
            self.sidecars.write(record, texts)
        self.store.add(record)
        self.num_faults_in_a_row = 0
        if is_shared:
            self.counts.shared += 1
        else:
            self.counts.done += 1
            self.counts.num_visual_tokens_in += record.get("num_visual_tokens_in") or 0
            self.counts.num_visual_tokens_kept += record.get("num_visual_tokens_kept") or 0
        self._note(None if is_shared else record.get("num_completion_tokens"))

    def _fail(self, row: Row, stage: str, code: str, message: str, attempts: int, *, is_fault: bool) -> None:
        self.last_fault = message if is_fault else self.last_fault
        self.num_faults_in_a_row = self.num_faults_in_a_row + 1 if is_fault else 0
        if self.ended_by_faults or (is_fault and self.stop):
            return
        before = self.earlier_failures.get(row.key, {}).get("attempts", 0)
        facts = {"stage": stage, "code": code, "message": message, "attempts": before + attempts}
        self.store.fail({"id": row.id, "source": row.source, **facts})
        self.counts.failed += 1
        self._note(None)

    def _note(self, length: int | None) -> None:
        self.history.note(time.monotonic() - self.began, self.counts.now, length)
        self.progress.advance()


__all__ = ["BatchJob", "run_batch"]
