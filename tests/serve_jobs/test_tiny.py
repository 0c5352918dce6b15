"""Caption jobs with real models: the loading thread, the decoder's lock and torch together."""

from __future__ import annotations

import shutil
from pathlib import Path

import mm
from mm.core.config import ModelConfig, SourcePolicy
from serve.jobs.caption import run_caption
from serve.jobs.job import CaptionJob
from tests.serve_jobs.conftest import read_lines

SAMPLES = Path(__file__).resolve().parents[2] / "demos" / "samples"
REDUCER = "uniform:keep_ratio=0.25"


def test_the_shipped_model_captions_images_and_clips_as_it_answers_in_python(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("shapes_and_text.png", "many_shapes.png", "clip.mp4"):
        shutil.copy(SAMPLES / name, folder / name)
    whole = (folder / "many_shapes.png").read_bytes()
    (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    (folder / "no_clip.mp4").write_text("this is text")
    model = ModelConfig(reducer=REDUCER)
    assert run_caption(CaptionJob(inputs=(str(folder),), out=out, model=model, max_tokens=12)) == 3

    lines = {Path(line["path"]).name: line for line in read_lines(out / "captions.jsonl")}
    assert list(lines) == ["clip.mp4", "many_shapes.png", "shapes_and_text.png"]
    failures = {Path(line["path"]).name: line["code"] for line in read_lines(out / "failures.jsonl")}
    assert failures == {"damaged.png": "media_undecodable", "no_clip.mp4": "media_undecodable"}

    tiny = mm.load("tiny", reducer=REDUCER, sources=SourcePolicy(allow_paths=True))
    for name, line in lines.items():
        kind = "videos" if name.endswith("mp4") else "images"
        prompt = "Describe the video." if kind == "videos" else "Describe the image."
        answer = tiny.generate(prompt, **{kind: [folder / name]}, max_new_tokens=12, temperature=0.0)
        assert line["caption"] == answer.text
        assert line["finish_reason"] == answer.finish_reasons[0]
        assert line["num_visual_tokens_in"] == 4 * line["num_visual_tokens_kept"] > 0
        assert line["num_prompt_tokens"] == answer.usage.num_prompt_tokens
        assert line["reducer"] == answer.reducer == REDUCER
        assert line["timings"]["encode_s"] > 0
        assert line["timings"]["decode_s"] > 0


def test_a_model_that_does_not_exist_is_exit_code_1(tmp_path: Path, capsys):
    shutil.copy(SAMPLES / "many_shapes.png", tmp_path / "a.png")
    job = CaptionJob(inputs=(str(tmp_path),), out=tmp_path / "out", model=ModelConfig(model="./nowhere"))
    assert run_caption(job) == 1
    assert "the model './nowhere' does not exist here" in capsys.readouterr().err
