"""`mm eval`, once its options are read."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm.config import ModelConfig
from mm.models.locate import find
from mm.plugins.spec import build_reducer
from serve.evaluation.client import Backend
from serve.evaluation.items import EvaluationError, choose, read_test_set
from serve.evaluation.report import progress, tables
from serve.evaluation.resumable import ResumableBackend, files_of
from serve.evaluation.run import answer_lines, ask_items, num_questions, result_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One run of `mm eval`.

    Attributes:
        data: A Parquet file; None for the held-out set we ship.
        reducers: One column each; empty leaves the choice to the model or server.
        tasks, wording, limit: Which items; `limit` counts per task and wording.
        control: Ask everything once more with the media swapped.
        suffix: Put after every question.
        json_file, answers_file: Where the result and the single answers go.
        url: A server to ask; None loads `model` here.
        served_model, api_key, concurrency: For the server.
        num_frames: Taken of a clip.
        max_tokens: Longest answer.
    """

    data: Path | None = None
    reducers: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    wording: str | None = None
    limit: int | None = None
    control: bool = True
    suffix: str = ""
    json_file: Path | None = None
    answers_file: Path | None = None
    quiet: bool = False
    url: str | None = None
    served_model: str | None = None
    api_key: str | None = None
    concurrency: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    num_frames: int = 16
    max_tokens: int = 192


def build_backend(job: Evaluation) -> Backend:
    """Load the model or reach the server.

    Raises:
        MmError: It cannot be done, or a reducer does not exist.
    """
    if job.url is None:
        from serve.evaluation.local import LocalBackend

        for reducer in job.reducers:
            build_reducer(reducer)
        return LocalBackend(job.model, num_frames=job.num_frames, max_tokens=job.max_tokens)
    from serve.evaluation.remote import RemoteBackend

    return RemoteBackend(
        job.url,
        model=job.served_model,
        api_key=job.api_key,
        concurrency=job.concurrency,
        num_frames=job.num_frames,
        max_tokens=job.max_tokens,
    )


def run_evaluation(job: Evaluation, *, build: Callable[[Evaluation], Backend] = build_backend) -> None:
    """Ask, count, write and print.

    While it runs, the answers are in a file beside the result, and the same command goes on from there.

    Raises:
        MmError: Names what was given and what to do. Nothing has been written then.
    """
    test_set = read_test_set(job.data)
    items = choose(test_set, job.tasks, job.wording, job.limit)
    outputs = [path for path in (job.json_file, job.answers_file) if path is not None]
    _check_writable(outputs)
    reducers: list[str | None] = [*dict.fromkeys(job.reducers)] or [None if job.url else job.model.reducer]
    by_id = test_set.by_id()
    backend = build(job)
    if outputs:
        state = files_of(find(job.model.model)) if job.url is None else None
        backend = ResumableBackend(backend, partial_of(outputs[0]), state)
        if backend.num_found and not job.quiet:
            sys.stderr.write(f"mm: {backend.num_found} answers of an earlier run are in {partial_of(outputs[0])}\n")
    with (
        contextlib.closing(backend),
        progress(num_questions(items, reducers, control=job.control), quiet=job.quiet) as advance,
    ):
        columns = [
            ask_items(items, by_id, backend, reducer, control=job.control, suffix=job.suffix, advance=advance)
            for reducer in reducers
        ]
    data = {
        "name": test_set.name,
        "sha256": test_set.sha256,
        "num_items": len(items),
        "num_media": len({item.media_index for item in items}),
        "tasks": list(dict.fromkeys(item.task for item in items)),
        "wording": job.wording,
        "limit": job.limit,
        "suffix": job.suffix,
    }
    result = result_of(items, columns, data=data, backend=backend.metadata())
    if job.json_file is not None:
        _write(job.json_file, json.dumps(result, indent=1) + "\n")
    if job.answers_file is not None:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in answer_lines(items, columns))
        _write(job.answers_file, "".join(lines))
    if isinstance(backend, ResumableBackend):
        backend.forget()
    sys.stdout.write(tables(result) + "\n")


def partial_of(output: Path) -> Path:
    """Where the answers of a run that has not ended yet are."""
    return output.with_name(f"{output.name}.partial")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _check_writable(paths: Sequence[Path]) -> None:
    """Refuse a result file that cannot be written before minutes are spent on it."""
    for path in paths:
        existed = path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from None
        if not existed:
            path.unlink()
