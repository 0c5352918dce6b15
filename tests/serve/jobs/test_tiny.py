"""Caption jobs with real models: the loading thread, the decoder's lock and torch together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mm
from mm.config import ModelConfig, OnError, ReducerPolicy, SourcePolicy
from mm.plugins.spec import reducer_spec
from pruning.in_llm.fastv import FastV
from serve.jobs.caption import run_caption
from serve.jobs.job import CaptionJob
from tests.serve.jobs.conftest import read_lines

SAMPLES = Path(__file__).resolve().parents[3] / "demos" / "samples"


def test_the_shipped_model_captions_images_and_clips_as_it_answers_in_python(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("shapes_and_text.png", "many_shapes.png", "clip.mp4"):
        shutil.copy(SAMPLES / name, folder / name)
    whole = (folder / "many_shapes.png").read_bytes()
    (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    (folder / "no_clip.mp4").write_text("this is text")
    model = ModelConfig(keep_ratio=0.25)
    assert run_caption(CaptionJob(inputs=(str(folder),), out=out, model=model, max_tokens=12)) == 3

    lines = {Path(line["path"]).name: line for line in read_lines(out / "captions.jsonl")}
    assert list(lines) == ["clip.mp4", "many_shapes.png", "shapes_and_text.png"]
    failures = {Path(line["path"]).name: line["code"] for line in read_lines(out / "failures.jsonl")}
    assert failures == {"damaged.png": "media_undecodable", "no_clip.mp4": "media_undecodable"}

    tiny = mm.load("tiny", sources=SourcePolicy(allow_paths=True))
    for name, line in lines.items():
        kind = "videos" if name.endswith("mp4") else "images"
        prompt = "Describe the video." if kind == "videos" else "Describe the image."
        answer = tiny.generate(prompt, **{kind: [folder / name]}, keep_ratio=0.25, max_new_tokens=12, temperature=0.0)
        assert line["caption"] == answer.text
        assert line["finish_reason"] == answer.finish_reasons[0]
        assert line["num_visual_tokens_in"] == 4 * line["num_visual_tokens_kept"] > 0
        assert line["num_prompt_tokens"] == answer.usage.num_prompt_tokens
        assert line["reducer"] == answer.reducer == reducer_spec("divprune:keep_ratio=0.25").canonical
        assert line["timings"]["encode_s"] > 0
        assert line["timings"]["decode_s"] > 0
        assert "reducer_faults" not in line


@pytest.mark.parametrize("on_error", ["fail", "keep_all"])
def test_a_reducer_at_fault_fails_the_item_or_keeps_its_tokens(tmp_path: Path, monkeypatch, capsys, on_error: OnError):
    """An equal file, which shares the caption, shares the flag."""

    def fail(self: FastV, layer: int, view: object) -> None:
        raise RuntimeError("a secret of the plugin")

    monkeypatch.setattr(FastV, "in_prefill", fail)
    for name in ("a.png", "b.png"):
        shutil.copy(SAMPLES / "many_shapes.png", tmp_path / name)
    model = ModelConfig(reducer="fastv", reducers=ReducerPolicy(on_error=on_error))
    job = CaptionJob(inputs=(str(tmp_path),), out=tmp_path / "out", model=model, max_tokens=4, as_json=True)
    reported = "fastv: failed at layer 2: RuntimeError"
    if on_error == "fail":
        assert run_caption(job) == 3
        failures = read_lines(job.out / "failures.jsonl")
        assert [(line["code"], line["reason"]) for line in failures] == [("reducer_fault", reported)] * 2
        return
    assert run_caption(job) == 0
    lines = read_lines(job.out / "captions.jsonl")
    assert [line["reducer_faults"] for line in lines] == [[reported]] * 2
    assert lines[0]["num_visual_tokens_kept"] == lines[0]["num_visual_tokens_in"] == 256
    said = capsys.readouterr()
    assert json.loads(said.out)["num_reducer_faults"] == 2
    assert "2 with all tokens as the reducer failed" in " ".join(said.err.split())


def test_a_model_that_does_not_exist_is_exit_code_1(tmp_path: Path, capsys):
    shutil.copy(SAMPLES / "many_shapes.png", tmp_path / "a.png")
    job = CaptionJob(inputs=(str(tmp_path),), out=tmp_path / "out", model=ModelConfig(model="./nowhere"))
    assert run_caption(job) == 1
    assert "the model './nowhere' does not exist here" in capsys.readouterr().err
