from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mm.config import ModelConfig
from mm.errors import UnknownModel
from serve.jobs import report as report_module
from serve.jobs.caption import MAX_FAULTS_IN_A_ROW, run_caption
from serve.jobs.job import CaptionJob, JobError
from tests.serve.jobs.conftest import read_lines
from tests.serve.jobs.fake import FakeCaptioner, FakeEncoded, caption_of


class Case:
    """Runs jobs over one folder into another, each with a new fake model."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out, self.num_steps = folder, out, 0

    def run(self, **options) -> int:
        self.model = FakeCaptioner(num_steps=self.num_steps)
        self.num_built = 0

        def build(_: CaptionJob) -> FakeCaptioner:
            self.num_built += 1
            return self.model

        options.setdefault("inputs", (str(self.folder),))
        return run_caption(CaptionJob(out=self.out, **options), build=build)

    def captions(self) -> dict[str, str]:
        return {os.path.basename(line["path"]): line["caption"] for line in read_lines(self.out / "captions.jsonl")}

    def failures(self) -> dict[str, str]:
        return {os.path.basename(line["path"]): line["code"] for line in read_lines(self.out / "failures.jsonl")}


@pytest.fixture
def case(folder: Path, tmp_path: Path) -> Case:
    return Case(folder, tmp_path / "out")


Fill = Callable[..., None]


def test_a_record_says_what_was_done(case: Case, fill: Fill):
    fill(a="first")
    assert case.run(prompt="What is it?") == 0
    (line,) = read_lines(case.out / "captions.jsonl")
    path = case.folder / "a.png"
    assert line.pop("timings") | {"load_s": 0} == {
        "load_s": 0,
        "encode_s": 0.5,
        "reduce_s": 0.0,
        "queue_s": 0.0,
        "prefill_s": 0.0,
        "decode_s": 0.25,
    }
    assert len(line.pop("content_hash")) == 64
    assert line == {
        "path": str(path),
        "kind": "image",
        "size_bytes": 5,
        "mtime_ns": path.stat().st_mtime_ns,
        "caption": caption_of(b"first"),
        "finish_reason": "stop",
        "num_visual_tokens_in": 16,
        "num_visual_tokens_kept": 4,
        "num_prompt_tokens": 20,
        "num_completion_tokens": 2,
        "model": "tiny",
        "reducer": "uniform:keep_ratio=0.25",
    }
    assert case.model.prompts == ["What is it?"]


def test_images_and_clips_have_prompts_of_their_own(case: Case, fill: Fill):
    fill(a="image")
    (case.folder / "b.mp4").write_text("clip")
    assert case.run() == 0
    assert case.model.prompts == ["Describe the image.", "Describe the video."]


def test_failures_have_a_fixed_text_and_the_rest_goes_on(case: Case, fill: Fill, caplog, capsys):
    fill(a="1", b="broken", c="2", d="", e="fault", f="3")
    (case.folder / "g.png").symlink_to("nowhere")
    assert case.run() == 3
    assert list(case.captions()) == ["a.png", "c.png", "f.png"]
    lines = {os.path.basename(one["path"]): one for one in read_lines(case.out / "failures.jsonl")}
    assert {name: (line["step"], line["code"]) for name, line in lines.items()} == {
        "b.png": ("encode", "media_undecodable"),
        "d.png": ("load", "media_empty"),
        "e.png": ("answer", "internal_error"),
        "g.png": ("load", "media_file_not_found"),
    }
    assert "RuntimeError" in lines["e.png"]["reason"]
    assert "secret" not in lines["e.png"]["reason"]
    assert "secret" in caplog.text
    said = capsys.readouterr().err
    assert said.index("4 items failed:") < said.index("b.png: the image cannot be decoded", said.index("4 items"))


def test_nothing_to_do_does_not_load_the_model_and_keeps_the_exit_code(case: Case, fill: Fill, capsys):
    fill(a="1")
    assert case.run() == 0
    before = (case.out / "captions.jsonl").read_bytes()
    assert case.run() == 0
    assert case.num_built == 0
    fill(b="broken")
    assert case.run() == 3
    capsys.readouterr()
    assert case.run() == 3
    assert case.num_built == 0
    assert (case.out / "captions.jsonl").read_bytes() == before
    assert "b.png: the image cannot be decoded" in capsys.readouterr().err


def test_new_inputs_add_to_the_results(case: Case, fill: Fill):
    fill(a="1", b="2", c="3")
    assert case.run(limit=1) == 0
    assert case.run(limit=1) == 0
    assert list(case.captions()) == ["a.png"]
    assert case.run(inputs=(str(case.folder / "c.png"),)) == 0
    assert case.run() == 0
    assert list(case.captions()) == ["a.png", "c.png", "b.png"]


def test_failed_items_are_tried_again_only_when_asked_or_changed(case: Case, fill: Fill, monkeypatch):
    fill(a="1", b="broken", c="broken too")
    assert case.run() == 3
    assert case.run() == 3
    assert case.num_built == 0
    fill(b="repaired")
    assert case.run() == 3
    assert list(case.captions()) == ["a.png", "b.png"]
    assert list(case.failures()) == ["c.png"]
    monkeypatch.setattr(FakeCaptioner, "encode", lambda self, request, budget: [FakeEncoded(b"readable now")])
    assert case.run() == 3
    assert case.run(retry_failed=True) == 0
    assert case.failures() == {}
    assert list(case.captions()) == ["a.png", "b.png", "c.png"]


def test_a_retry_that_is_cut_short_is_taken_up_again(case: Case, fill: Fill, monkeypatch):
    fill(a="1", b="broken", c="broken too")
    assert case.run() == 3

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeCaptioner, "encode", die)
    assert case.run(retry_failed=True) == 130
    monkeypatch.undo()
    assert case.run() == 3
    assert case.model.num_answered == 0
    assert list(case.captions()) == ["a.png"]
    assert list(case.failures()) == ["b.png", "c.png"]


def test_a_changed_file_is_done_again_and_a_touched_one_is_not(case: Case, fill: Fill):
    fill(a="1", b="2")
    assert case.run() == 0
    os.utime(case.folder / "a.png", ns=(1, 1))
    assert case.run() == 0
    assert case.num_built == 0
    fill(a="new")
    assert case.run() == 0
    assert case.model.num_answered == 1
    assert case.captions() == {"b.png": caption_of(b"2"), "a.png": caption_of(b"new")}
    fill(b="broken")
    assert case.run() == 3
    assert list(case.captions()) == ["a.png"]
    assert list(case.failures()) == ["b.png"]


def test_equal_files_share_one_answer_over_runs_too(case: Case, fill: Fill):
    fill(a="same", b="other", c="same", d="same")
    assert case.run(limit=3) == 0
    assert case.model.num_answered == 2
    assert case.run() == 0
    assert case.model.num_answered == case.model.num_encoded == 0
    lines = read_lines(case.out / "captions.jsonl")
    assert [os.path.basename(line["path"]) for line in lines] == ["a.png", "b.png", "c.png", "d.png"]
    assert [line.get("same_as") for line in lines] == [None, None, *[str(case.folder / "a.png")] * 2]
    assert {line["caption"] for line in lines if "b.png" not in line["path"]} == {caption_of(b"same")}
    assert lines[2]["timings"]["decode_s"] == 0
    assert lines[2]["num_visual_tokens_in"] == 16


def test_other_settings_are_refused_and_restart_discards(case: Case, fill: Fill, capsys):
    fill(a="1", b="broken")
    assert case.run() == 3
    before = (case.out / "captions.jsonl").read_bytes()
    model = ModelConfig(reducer="uniform:keep_ratio=0.5")
    assert case.run(prompt="Why?", max_tokens=5, model=model) == 1
    said = capsys.readouterr().err
    assert "image prompt was 'Describe the image.' and is now 'Why?'" in said
    assert "max_tokens was 128 and is now 5" in said
    assert "reducer was 'none' and is now 'uniform:keep_ratio=0.5'" in said
    assert (case.out / "captions.jsonl").read_bytes() == before
    fill(b="good")
    assert case.run(prompt="Why?", restart=True) == 0
    assert case.model.prompts == ["Why?"] * 2
    assert list(case.captions()) == ["a.png", "b.png"]
    assert case.failures() == {}
    assert case.run(prompt="Why?") == 0


def test_equal_reducers_written_differently_are_equal_settings(case: Case, fill: Fill):
    fill(a="1")
    assert case.run(model=ModelConfig(reducer="uniform:keep_ratio=0.5")) == 0
    assert case.run(model=ModelConfig(reducer=" uniform : keep_ratio = 0.5 ", device="cuda")) == 0


def test_restart_with_a_model_that_does_not_load_discards_nothing(case: Case, fill: Fill, capsys):
    fill(a="1")
    assert case.run() == 0

    def build(_: CaptionJob) -> FakeCaptioner:
        raise UnknownModel("nope", ["tiny"])

    job = CaptionJob(inputs=(str(case.folder),), out=case.out, restart=True, model=ModelConfig(model="nope"))
    assert run_caption(job, build=build) == 1
    assert "the model 'nope' does not exist here" in capsys.readouterr().err
    assert list(case.captions()) == ["a.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no images or clips were found in: "),
        ({"inputs": ("/nowhere/*.png",)}, "nothing matches /nowhere/*.png"),
        ({"model": ModelConfig(reducer="unifrom")}, "no reducer named 'unifrom'; did you mean 'uniform'?"),
    ],
)
def test_exit_code_1_when_nothing_can_run(case: Case, options: dict, message: str, capsys):
    (case.folder / "notes.txt").touch()
    if "model" in options:
        (case.folder / "a.png").write_text("1")
    assert case.run(**options) == 1
    assert message in capsys.readouterr().err
    assert case.num_built == 0
    assert not case.out.exists()


def test_an_input_that_does_not_exist_makes_the_exit_code_3(case: Case, fill: Fill, capsys):
    fill(a="1")
    assert case.run(inputs=(str(case.folder), "/nowhere")) == 3
    assert "/nowhere does not exist" in capsys.readouterr().err
    assert list(case.captions()) == ["a.png"]


def test_an_output_folder_that_cannot_be_made_is_reported(case: Case, fill: Fill, capsys):
    fill(a="1")
    case.out.write_text("a file")
    assert case.run() == 1
    assert "File exists" in capsys.readouterr().err


def test_faults_in_a_row_end_the_job_with_the_rest_left_for_later(case: Case, fill: Fill, capsys):
    fill(**{f"a{i}": f"fault{i}" for i in range(MAX_FAULTS_IN_A_ROW + 4)})
    assert case.run() == 1
    assert len(case.failures()) == MAX_FAULTS_IN_A_ROW
    assert "in a row failed, and not because of the items" in capsys.readouterr().err
    fill(**{f"a{i}": f"good{i}" for i in range(MAX_FAULTS_IN_A_ROW + 4)})
    assert case.run(retry_failed=True) == 0
    assert len(case.captions()) == MAX_FAULTS_IN_A_ROW + 4


def test_broken_files_in_a_row_do_not_end_the_job(case: Case, fill: Fill):
    fill(**{f"a{i}": f"broken{i}" for i in range(MAX_FAULTS_IN_A_ROW + 4)}, z="good")
    assert case.run() == 3
    assert list(case.captions()) == ["z.png"]


def test_an_interrupt_while_an_item_is_loaded_leaves_it_for_later(case: Case, fill: Fill, monkeypatch):
    fill(a="1", b="interrupt", c="3")
    encode = FakeCaptioner.encode

    def interrupted(self, request, budget):
        if request.media[0].data == b"interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, request, budget)

    monkeypatch.setattr(FakeCaptioner, "encode", interrupted)
    assert case.run(num_prefetch=0) == 130
    assert list(case.captions()) == ["a.png"]
    assert case.model.num_answered == 1


def test_an_interrupt_while_an_item_is_answered_finishes_it_and_loads_no_more(case: Case, fill: Fill, monkeypatch):
    fill(**{f"a{i}": f"{i}" for i in range(9)})
    answer = FakeCaptioner.answer

    def interrupted(self, request, encoded):
        os.kill(os.getpid(), signal.SIGINT)
        return answer(self, request, encoded)

    monkeypatch.setattr(FakeCaptioner, "answer", interrupted)
    assert case.run(num_prefetch=0) == 130
    assert list(case.captions()) == ["a0.png"]
    assert case.model.num_encoded == 1


@pytest.mark.parametrize("num_prefetch", [0, 1, 3])
def test_items_ahead_stay_few_and_order_stays(case: Case, fill: Fill, num_prefetch: int):
    fill(**{f"a{i:02}": f"text {i}" for i in range(40)})
    assert case.run(num_prefetch=num_prefetch) == 0
    assert case.model.most_waiting <= num_prefetch + 1
    assert list(case.captions()) == [f"a{i:02}.png" for i in range(40)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.parametrize("num_together", [1, 3])
def test_items_are_answered_together_and_written_in_order(case: Case, fill: Fill, monkeypatch, num_together: int):
    """The model only goes on when it has as many as it may have, or there are no more."""
    case.num_steps = 2
    fill(**{f"a{i:02}": f"text {i}" for i in range(20)})
    step = FakeCaptioner.step

    def step_when_full(self) -> bool:
        return (len(self.under_way) == num_together or self.num_answered == 20) and step(self)

    monkeypatch.setattr(FakeCaptioner, "step", step_when_full)
    assert case.run(num_together=num_together) == 0
    assert case.model.most_under_way == num_together
    assert list(case.captions()) == [f"a{i:02}.png" for i in range(20)]


def test_equal_files_that_come_together_share_one_answer(case: Case, fill: Fill):
    """One whose equal comes to nothing is tried itself."""
    case.num_steps = 5
    fill(a="same", b="same", c="fault", d="fault", e="same")
    assert case.run() == 3
    assert case.model.num_answered == 3
    assert case.captions() == {f"{name}.png": caption_of(b"same") for name in "abe"}
    assert list(case.failures()) == ["c.png", "d.png"]


def test_a_full_disk_ends_the_job_and_the_next_run_goes_on(case: Case, fill: Fill, monkeypatch, capsys):
    fill(a="1", b="2", c="3")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:9] if b"b.png" in data else data))
    assert case.run() == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert list(case.captions()) == ["a.png"]
    assert case.run() == 0
    assert list(case.captions()) == ["a.png", "b.png", "c.png"]


def test_the_counts_come_as_one_line_of_json(case: Case, fill: Fill, capsys):
    fill(a="1", b="1", c="broken")
    (case.folder / "notes.txt").touch()
    assert case.run(as_json=True, quiet=True) == 3
    out, err = capsys.readouterr()
    counts = json.loads(out)
    assert counts.pop("elapsed_s") > 0
    assert counts == {
        "num_items": 3,
        "num_captioned": 1,
        "num_shared": 1,
        "num_failed": 1,
        "num_captioned_before": 0,
        "num_failed_before": 0,
        "num_remaining": 0,
        "num_reducer_faults": 0,
        "num_visual_tokens_in": 16,
        "num_visual_tokens_kept": 4,
        "exit_code": 3,
        "out": str(case.out),
        "skipped": {".txt": 1},
        "problems": [],
    }
    assert "c.png: the image cannot be decoded" in err
    assert "captioned" not in err


def test_without_a_terminal_there_are_plain_lines(case: Case, fill: Fill, capsys, monkeypatch):
    monkeypatch.setattr(report_module, "LINE_INTERVAL_S", 0.0)
    fill(a="1", b="broken")
    (case.folder / "c\x1b[31m\n[red].png").write_text("broken as well")
    assert case.run() == 3
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "1 done, 0 of them failed; 2 to go" in said
    assert r"c\x1b[31m\n[red].png: the image cannot be decoded" in said
    assert "1 captioned (0 as equal files), 2 failed; kept 4 of 16 visual tokens (25%)" in said


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_there_is_a_bar_and_no_color_is_honoured(
    case: Case, fill: Fill, monkeypatch: pytest.MonkeyPatch, no_color: bool
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = io.StringIO()
    monkeypatch.setattr(report_module, "Console", lambda **options: Console(**options | _terminal(screen)))
    fill(a="1", b="broken")
    assert case.run() == 3
    assert "2/2" in screen.getvalue()
    assert ("\x1b[33m" in screen.getvalue()) is not no_color


def _terminal(screen: io.StringIO) -> dict:
    return {"file": screen, "force_terminal": True, "width": 100, "stderr": False}


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"limit": 0}, {"num_prefetch": -1}, {"num_together": 0}, {"prompt": "  "}]
)
def test_values_that_make_no_sense_are_refused(options: dict):
    with pytest.raises(JobError):
        CaptionJob(inputs=("a",), out=Path("b"), **options)
