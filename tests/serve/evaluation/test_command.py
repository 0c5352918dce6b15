"""`mm eval` from the command line: with the shipped model, through HTTP, and where it stops."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

import serve.cli.app as app_module
import serve.evaluation.command as command
from serve.evaluation.client import EvalRequest
from serve.evaluation.items import write_test_set
from serve.evaluation.resumable import ResumableBackend
from tests.serve.evaluation.conftest import FakeBackend, picture


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, stdout and stderr of `mm eval`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mm", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        reported = capsys.readouterr()
        return int(ended.value.code or 0), reported.out, reported.err

    return call


@pytest.fixture
def fake(monkeypatch):
    """The command, with a fake model in place of a loaded one."""
    defaults = command.run_evaluation.__kwdefaults__
    monkeypatch.setitem(defaults, "build", lambda job: FakeBackend())


@pytest.mark.usefixtures("fake")
def test_two_runs_write_the_same_bytes(run, file, tmp_path):
    outputs = []
    for name in ("one", "two"):
        result, answers = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        code, table, _ = run("--data", file, "--json", result, "--answers", answers, "--reducer", "none")
        assert code == 0
        outputs.append((result.read_bytes(), answers.read_bytes(), table))
    assert outputs[0] == outputs[1]
    result = json.loads(outputs[0][0])
    assert result["data"]["num_items"] == 10
    assert result["columns"] == [{"reducer": "none", "kept_share": 0.25}]
    assert [json.loads(line)["id"] for line in outputs[0][1].decode().splitlines()][:2] == ["color-0", "exist-0"]


@pytest.mark.usefixtures("fake")
def test_the_table_is_all_there_is_on_stdout(run, file):
    code, table, progress = run("--data", file, "--task", "color", "--no-control", "--quiet")
    assert code == 0
    assert table.startswith("fake through a test: 4 questions on 4 media of set.parquet")
    assert "exist" not in table
    assert progress == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "colour"],
            "no task 'colour' in set.parquet; did you mean 'color'? (tasks: color, exist, clip-length)",
        ),
        (["--wording", "new"], "no wording 'new'"),
        (["--data", "absent.parquet"], "cannot read absent.parquet"),
        (["--json", "absent/result.json"], "cannot write absent/result.json"),
        (["--reducer", "divprun"], "did you mean 'divprune'"),
        (["--reducer", "divprune:keep_ratio=2"], "keep_ratio"),
        (["--model", "tinny"], "the model 'tinny' does not exist"),
        (["--url", "http://127.0.0.1:9"], "no server can be reached"),
        (["--url", "http://127.0.0.1:9", "--quantize", "int8"], "'quantize' is a setting of the model behind --url"),
        (["--concurrency", "3"], "'concurrency' needs --url"),
    ],
)
def test_mistakes_are_reported_in_one_line(run, file, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, table, reported = run("--data", file, *arguments)
    assert code == 1
    assert table == ""
    assert message in reported
    assert len(reported.splitlines()) == 1


def test_a_medium_that_is_none_is_named_by_its_item(run, tmp_path, items):
    damaged = [dataclasses.replace(item, media=item.media[:40]) for item in items if item.task == "color"]
    write_test_set(tmp_path / "set.parquet", damaged)
    code, table, reported = run("--data", tmp_path / "set.parquet", "--quiet", "--threads", 1)
    assert (code, table) == (1, "")
    assert reported.startswith("mm: at item 'color-0': ")
    assert len(reported.splitlines()) == 1


@pytest.mark.usefixtures("fake")
def test_a_run_that_stops_leaves_earlier_results_alone(run, file, tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    kept.write_text("earlier")
    assert run("--data", file, "--json", kept, "--answers", tmp_path / "absent" / "a.jsonl")[0] == 1
    assert kept.read_text() == "earlier"
    assert run("--data", file, "--json", tmp_path / "new.json", "--answers", tmp_path / "absent" / "a.jsonl")[0] == 1
    assert not (tmp_path / "new.json").exists()


def test_a_run_that_was_ended_goes_on_where_it_stopped(run, file, tmp_path, monkeypatch):
    class Ending(FakeBackend):
        """Ends the process at the seventh question, if it is asked to."""

        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def answers(self, requests, reducer):
            for reply in super().answers(requests, reducer):
                if len(self.asked) == self.last:
                    raise KeyboardInterrupt
                yield reply

    def use(last: int) -> Ending:
        backend = Ending(last)
        monkeypatch.setitem(command.run_evaluation.__kwdefaults__, "build", lambda job: backend)
        return backend

    def evaluate(name: str) -> int:
        files = ("--json", tmp_path / f"{name}.json", "--answers", tmp_path / f"{name}.jsonl")
        return run("--data", file, *files, "--reducer", "none", "--quiet")[0]

    whole = use(-1)
    assert evaluate("whole") == 0
    use(7)
    assert evaluate("cut") == 1
    partial = tmp_path / "cut.json.partial"
    partial.write_bytes(partial.read_bytes()[:-5])  # killed while it wrote the sixth answer
    rest = use(-1)
    assert evaluate("cut") == 0
    assert not list(tmp_path.glob("*.partial"))
    for kind in ("json", "jsonl"):
        assert (tmp_path / f"cut.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert 0 < len(rest.asked) <= len(whole.asked) - 5  # less where a control asks what was answered already


def test_a_model_that_was_trained_on_is_asked_again(run, file, tmp_path, monkeypatch):
    folder, result, backends = tmp_path / "model", tmp_path / "result.json", list[FakeBackend]()
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "model.safetensors").write_bytes(b"old")

    def build(job: object) -> FakeBackend:
        backends.append(FakeBackend())
        return backends[-1]

    monkeypatch.setitem(command.run_evaluation.__kwdefaults__, "build", build)
    monkeypatch.setattr(ResumableBackend, "forget", lambda _: None)  # as if each run were ended
    monkeypatch.setattr("serve.cli.evaluate.check_early", lambda _: None)
    arguments = ("--data", file, "--json", result, "--model", folder, "--reducer", "none", "--quiet")
    for weights, is_asked in ((b"old", True), (b"old", False), (b"newer", True)):
        if (folder / "model.safetensors").read_bytes() != weights:
            (folder / "model.safetensors").write_bytes(weights)
        assert run(*arguments)[0] == 0
        assert bool(backends[-1].asked) == is_asked


@pytest.mark.usefixtures("fake")
def test_answers_of_another_model_are_not_taken(run, file, tmp_path, monkeypatch):
    result = tmp_path / "result.json"
    assert run("--data", file, "--json", result, "--reducer", "none", "--quiet")[0] == 0
    expected, backend = result.read_bytes(), FakeBackend()
    partial, named = command.partial_of(result), FakeBackend()
    monkeypatch.setattr(named, "metadata", lambda: {"model": "other"})
    other = ResumableBackend(named, partial)
    requests = [EvalRequest(item_id="color-0", question="Which color?", media=picture("red"), media_type="image/png")]
    assert [reply.text for reply in other.answers(requests, "none")] == [" RED."]
    partial.write_text(partial.read_text().replace(" RED.", "wrong"))
    monkeypatch.setitem(command.run_evaluation.__kwdefaults__, "build", lambda job: backend)
    assert run("--data", file, "--json", result, "--reducer", "none", "--quiet")[0] == 0
    assert result.read_bytes() == expected
