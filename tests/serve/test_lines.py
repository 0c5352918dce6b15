"""Files to which lines are appended by processes that are killed: what is cut, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mm.errors import InvalidOption
from serve.api.trace import HEADER, TraceRecorder
from serve.evaluation.client import EvalRequest, Reply
from serve.evaluation.items import EvaluationError
from serve.evaluation.resumable import ResumableBackend
from serve.jobs.batch.sinks import JsonLines
from serve.jobs.batch.store import PENDING, Store
from serve.jobs.job import JobError
from serve.lines import CHUNK_BYTES, cut_unfinished_line
from serve.planning.traces import read_trace
from serve.tuning.trials import Journal, Trial

TEXTS = ["plain", "line\u2028separator\u0085and\x1cothers", "\u6f22\u5b57 \U0001f600", 'quo"te\n']


@pytest.mark.parametrize("tail", [b"", b"x", b"x" * CHUNK_BYTES, b"x" * (2 * CHUNK_BYTES + 5)])
@pytest.mark.parametrize("lines", [b"", b"one\n", b"one\ntwo\n", b"y" * CHUNK_BYTES + b"\n"])
def test_only_what_stands_after_the_last_line_break_is_cut(tmp_path: Path, lines: bytes, tail: bytes):
    path = tmp_path / "file"
    path.write_bytes(lines + tail)
    cut_unfinished_line(path)
    assert path.read_bytes() == lines
    cut_unfinished_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def store(folder: Path) -> Store:
    return Store(folder=folder, sink=JsonLines(), settings={"a": 1}, shard_rows=100)


def record(number: int) -> dict:
    return {"id": number, "text": TEXTS[number % len(TEXTS)]}


def test_a_job_that_is_killed_in_the_middle_of_any_write_and_again_keeps_each_row_once(tmp_path: Path):
    """At each byte of its last line but one; the second kill is in the middle of the line that the next run wrote."""
    first = store(tmp_path / "whole")
    first.folder.mkdir()
    list(first.open())
    for number in range(4):
        first.add(record(number))
    first.fail({"id": 9, "code": "broken"})
    whole = (first.folder / PENDING).read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(b"".join(lines[:3]))
    for cut in range(start, len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        again = store(folder)
        list(again.open())
        (folder / PENDING).write_bytes(whole[:cut])  # the kill
        again = store(folder)
        found = [one["id"] for one in again.open()]
        assert found == list(range(3 + (cut >= start + len(lines[3]))))
        again.add(record(7))
        after = (folder / PENDING).read_bytes()
        (folder / PENDING).write_bytes(after[:-3])  # the second
        last = store(folder)
        assert [one["id"] for one in last.open()] == found
        for number in range(len(found), 8):
            last.add(record(number))
        last.close()
        done = [json.loads(line) for line in (folder / "part-00000.jsonl").read_text("utf-8").split("\n")[:-1]]
        assert done == [record(number) for number in range(8)]


def test_a_damaged_line_of_a_job_is_named(tmp_path: Path):
    list(store(tmp_path).open())
    (tmp_path / PENDING).write_bytes(b'{"record": {"id": 1}}\n{"recor{"record": {"id": 2}}\n{"record": {"id": 3}}\n')
    with pytest.raises(JobError, match=r"line 2 of .*pending\.jsonl is damaged"):
        list(store(tmp_path).open())


def test_a_recording_that_was_cut_goes_on(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}\n1.0,10,0,0,0,5\n2.0,10,0,0,0,5\n3.0,1")
    recorder = TraceRecorder(str(path), 8)
    recorder._write("4.0,10,0,0,0,5\n")
    assert read_trace(path, None).arrival_s.tolist() == [0.0, 1.0, 3.0]


def test_a_search_that_was_cut_goes_on(tmp_path: Path):
    path = tmp_path / "trials.jsonl"
    trials = [Trial(reducer=name, num_right=1, num_visual=2.0, num_text=3.0) for name in ("a", "b", "c")]
    journal = Journal(path, {"about": 1})
    for trial in trials[:2]:
        journal.put(trial)
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path, {"about": 1})
    assert (journal.get("a"), journal.get("b")) == (trials[0], None)
    journal.put(trials[2])
    assert Journal(path, {"about": 1}).get("c") == trials[2]


class Answers:
    """Says what it was asked last."""

    def metadata(self) -> dict:
        return {"model": "a"}

    def answers(self, requests: Iterable[EvalRequest], reducer: str | None) -> Iterator[Reply]:
        for request in requests:
            yield Reply(text=request.question)

    def close(self) -> None: ...


def test_answers_that_were_cut_at_any_byte_are_asked_again(tmp_path: Path):
    """Texts with separators that `str.splitlines` splits at are found again too."""
    path = tmp_path / "answers"
    requests = [EvalRequest(item_id=text, question=text, media=b"", media_type="image/png") for text in TEXTS]
    assert [reply.text for reply in ResumableBackend(Answers(), path).answers(requests, None)] == TEXTS
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        backend = ResumableBackend(Answers(), path)
        assert backend.num_found == sum(end <= cut for end in ends)
        assert [reply.text for reply in backend.answers(requests, None)] == TEXTS
        assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"my notes", b"my notes\nand more", b"\nnotes"])
def test_files_of_others_are_left_alone(tmp_path: Path, content: bytes):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(InvalidOption, match="holds something else"):
        TraceRecorder(str(path), 8)
    with pytest.raises(EvaluationError, match="another search"):
        Journal(path, {"about": 1})
    with pytest.raises(EvaluationError, match="something else"):
        ResumableBackend(Answers(), path)
    assert path.read_bytes() == content
