from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve.jobs.job import JobError
from serve.jobs.results import Journal, Version, discard, locked, open_output
from tests.serve.jobs.conftest import read_lines

SETTINGS = {"prompt": "why?", "max_tokens": 8}


def record(path: str, **more: object) -> dict:
    return {"path": path, "size_bytes": 3, "mtime_ns": 4, **more}


def journal_of(path: Path, *records: dict) -> Journal:
    journal = Journal(path)
    for one in records:
        journal.append(one)
    return journal


def test_records_are_found_again(tmp_path: Path):
    strange = "/a/\udcff é\u2028\n.png"  # a byte that is not UTF-8, and line ends of several kinds
    written = [record("/a/1.png", content_hash="h1"), record(strange, caption="ünï"), record("/a/2.png")]
    journal_of(tmp_path / "j", *written).close()
    journal = Journal(tmp_path / "j")
    assert [journal.read(path) for path in journal.entries] == written
    assert journal.entries[strange].version == Version(3, 4)
    assert journal.hash_to_path == {"h1": "/a/1.png"}
    assert (tmp_path / "j").read_bytes().count(b"\n") == 3
    journal.close()


def test_a_line_cut_at_any_byte_is_cut_off_and_the_lines_before_stay(tmp_path: Path):
    path = tmp_path / "j"
    journal_of(path, record("1"), record("2", caption="ä")).close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        journal = journal_of(path, record("3"))
        assert list(journal.entries) == ["1", "3"]
        journal.close()
        assert path.read_bytes() == whole[:first] + json.dumps(record("3")).encode() + b"\n"


def test_a_last_line_of_garbage_is_cut_off(tmp_path: Path):
    path = tmp_path / "j"
    journal_of(path, record("1")).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100 + b"\n")  # a file system may lengthen a file before its bytes arrive
    Journal(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{torn", b"[]", b'{"path": "x"}', b'{"path": "1", "size_bytes": 1, "mtime_ns": 1}'])
def test_damage_before_the_last_line_is_not_ours_and_nothing_is_touched(tmp_path: Path, line: bytes):
    path = tmp_path / "j"
    journal_of(path, record("1")).close()
    content = path.read_bytes() + line + b"\n" + json.dumps(record("2")).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(JobError, match="line 2 of"):
        Journal(path)
    assert path.read_bytes() == content


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = journal_of(tmp_path / "j", record("1"))
    before, write = (tmp_path / "j").read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))  # a full disk takes part of a line
    with pytest.raises(OSError, match="No space left"):
        journal.append(record("2"))
    monkeypatch.undo()
    assert (tmp_path / "j").read_bytes() == before
    journal.append(record("3"))
    journal.close()
    assert [one["path"] for one in read_lines(tmp_path / "j")] == ["1", "3"]


def test_dropped_records_are_gone_and_the_others_stay_in_order(tmp_path: Path):
    journal = journal_of(tmp_path / "j", *(record(str(i), content_hash=f"h{i}") for i in range(4)))
    journal.drop({"1", "2"})
    journal.append(record("5"))
    assert list(journal.entries) == ["0", "3", "5"]
    assert journal.hash_to_path == {"h0": "0", "h3": "3"}
    assert journal.read("3")["content_hash"] == "h3"
    journal.close()
    assert [one["path"] for one in read_lines(tmp_path / "j")] == ["0", "3", "5"]


def test_a_drop_that_is_cut_short_leaves_all_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = journal_of(tmp_path / "j", record("1"), record("2"))
    before = (tmp_path / "j").read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        journal.drop({"1"})
    journal.close()
    assert (tmp_path / "j").read_bytes() == before
    Journal(tmp_path / "j").close()
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path):
    with locked(tmp_path / "out"):
        with pytest.raises(JobError, match="another caption job is writing"), locked(tmp_path / "out"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "out"):
        pass


def test_other_settings_are_refused_by_name_once_there_are_results(tmp_path: Path):
    with open_output(tmp_path, SETTINGS) as output:
        output.begin(["in"], ())
    with open_output(tmp_path, SETTINGS | {"max_tokens": 9}) as output:
        output.begin(["in"], ())
        output.captions.append(record("1"))
    changed = {"prompt": "how?", "max_tokens": 9}
    message = r"prompt was 'why\?' and is now 'how\?'.*--out.*--restart"
    with pytest.raises(JobError, match=message) as error, open_output(tmp_path, changed):
        pass
    assert "max_tokens" not in str(error.value)


@pytest.mark.parametrize("job_file", [None, "", "[]", '{"settings": 1}'])
def test_files_that_are_not_ours_are_neither_added_to_nor_deleted(tmp_path: Path, job_file: str | None):
    line = json.dumps(record("1")) + "\n"
    (tmp_path / "captions.jsonl").write_text(line)
    if job_file is not None:
        (tmp_path / "job.json").write_text(job_file)
    with pytest.raises(JobError, match=r"no job\.json with the settings"), open_output(tmp_path, SETTINGS):
        pass
    with pytest.raises(JobError, match=r"no job\.json with the settings"):
        discard(tmp_path)
    assert (tmp_path / "captions.jsonl").read_text() == line


def test_an_item_in_both_files_is_refused(tmp_path: Path):
    with open_output(tmp_path, SETTINGS) as output:
        output.begin(["in"], ())
        output.captions.append(record("1"))
        output.failures.append(record("1"))
    with pytest.raises(JobError, match="is in both"), open_output(tmp_path, SETTINGS):
        pass


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to files, in order: "write NAME", "sync NAME", "replace NAME", "sync folder"."""
    events: list[str] = []
    write, fsync, replace = os.write, os.fsync, os.replace

    def name(fd: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return "folder" if path.is_dir() else path.name

    def note_write(fd: int, data: bytes) -> int:
        events.append(f"write {name(fd)}")
        return write(fd, data)

    def note_sync(fd: int) -> None:
        events.append(f"sync {name(fd)}")
        fsync(fd)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "write", note_write)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    return events


def test_a_record_is_on_the_disk_before_the_next_item_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "captions.jsonl")
    events = synced(monkeypatch)
    for i in range(2):
        journal.append(record(f"{i}.png"))
        assert events[-2:] == ["write captions.jsonl", "sync captions.jsonl"]


def test_what_a_drop_leaves_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = journal_of(tmp_path / "captions.jsonl", record("a.png"), record("b.png"))
    events = synced(monkeypatch)
    journal.drop({"a.png"})
    assert events == ["sync .captions.jsonl.new", "replace captions.jsonl", "sync folder"]


def test_a_line_that_is_cut_off_stays_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal_of(tmp_path / "captions.jsonl", record("a.png")).close()
    with open(tmp_path / "captions.jsonl", "ab") as file:
        file.write(b'{"path": "b')
    events = synced(monkeypatch)
    Journal(tmp_path / "captions.jsonl")
    assert events == ["sync captions.jsonl"]


def test_the_settings_of_a_job_are_on_the_disk_before_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = synced(monkeypatch)
    with open_output(tmp_path, SETTINGS) as folder:
        events.clear()
        folder.begin([], [])
    assert events == ["sync .job.json.new", "replace job.json", "sync folder"]
