"""`mm compare`: one table, one overlay per reducer, and nothing that a request would not have said too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import mm
from mm.config import ModelConfig, SourcePolicy
from mm.data.outputs import KeptMap
from mm.errors import InvalidOption, InvalidRequest, UnknownPlugin
from serve.compare.command import run_compare
from serve.compare.overlay import DIM, DROPPED, FRAME_SIDE_PX, GAP_PX, overlay
from serve.compare.run import Comparison
from tests.helpers.clips import clip_bytes

CONFIG = ModelConfig(
    dtype="float32",
    num_frames=4,
    cache_bytes=0,
    prefix_caching=False,
    kv_cache_gb=0.05,
    sources=SourcePolicy(allow_paths=True),
)
PROMPT = "What color is the star?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "picture.png"
    PIL.Image.fromarray(np.full((80, 120, 3), 200, np.uint8)).save(path)
    return path


def compared(capsys: pytest.CaptureFixture[str], path: Path, *reducers: str, **options: object) -> str:
    job = Comparison(path=path, prompt=PROMPT, reducers=reducers, model=CONFIG, max_tokens=3, **options)  # type: ignore[arg-type]
    run_compare(job)
    return capsys.readouterr().out


def test_a_picture_with_two_reducers(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reducers = ("uniform:keep_ratio=0.25", "fastv:keep_ratio=0.5,layer=2")
    shown = compared(capsys, picture, *reducers, out=tmp_path / "out")
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["reducer"]: row for row in result["rows"]}
    assert list(rows) == ["none", *reducers]
    none, uniform, fastv = rows.values()
    assert [row["tokens_in"] for row in rows.values()] == [256, 256, 256]
    assert [row["prompt_tokens"] for row in rows.values()] == [256, 64, 256]
    assert [row["kept_tokens"] for row in rows.values()] == [256, 64, 128]
    answer = mm.load(dtype="float32").generate(PROMPT, images=[picture], max_new_tokens=3, temperature=0)
    assert none["answer"] == answer.text.strip()
    # 192 fewer rows in each of 4 layers; 128 fewer in 2 of them; blocks of 16 rows.
    token_bytes = 2 * 2 * 64 * 4
    assert none["kv_bytes"] - uniform["kv_bytes"] == 4 * 192 * token_bytes
    assert none["kv_bytes"] - fastv["kv_bytes"] == 2 * 128 * token_bytes
    assert all(row["stages_s"]["prefill"] > 0 for row in rows.values())
    for row in rows.values():
        assert row["overlay"] is not None
        assert Path(row["overlay"]).is_file()
        assert f"overlay of {row['reducer']}" in shown
    assert "64 of 256" in shown
    assert f"none\n  {none['answer'] or '(an empty answer)'}" in shown


def test_a_clip_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(clip_bytes())
    result = json.loads(compared(capsys, clip, "evs:keep_ratio=0.5", out=tmp_path, as_json=True))
    none, evs = result["rows"]
    assert (none["tokens_in"], none["kept_tokens"], evs["kept_tokens"]) == (256, 256, 128)
    with PIL.Image.open(evs["overlay"]) as sheet:
        assert sheet.width == 4 * FRAME_SIDE_PX + 3 * GAP_PX


def test_nothing_is_written_without_a_folder(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "overlay" not in compared(capsys, picture, "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reducer", "error", "message"),
    [
        ("absent.png", "none", InvalidRequest, "absent.png is no file"),
        ("notes.txt", "none", InvalidRequest, r"no picture and no clip .* \.png"),
        ("picture.png", "divprun", UnknownPlugin, "did you mean 'divprune'"),
        ("picture.png", "divprune:keep_ratio=2", InvalidOption, "keep_ratio"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(
    name: str, reducer: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"not looked at")
    monkeypatch.setattr("serve.compare.command.Model", None)
    with pytest.raises(error, match=message):
        run_compare(Comparison(path=tmp_path / name, prompt=PROMPT, reducers=(reducer,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_overlay_dims_the_dropped_cells_and_no_other() -> None:
    pixels = np.full((40, 60, 3), 200, np.uint8)
    shown = np.asarray(overlay([pixels], KeptMap(kind="image", grid=(1, 2, 3), kept=(0, 4))), float)
    cells = [
        shown[int((y + 0.5) * shown.shape[0] / 2), int((x + 0.5) * shown.shape[1] / 3)]
        for y in (0, 1)
        for x in (0, 1, 2)
    ]
    dim = (1 - DIM) * 200 + DIM * DROPPED
    for i, cell in enumerate(cells):
        assert np.abs(cell - (200 if i in (0, 4) else dim)).max() <= 1


def test_frames_stand_in_reading_order_with_their_own_map() -> None:
    frames = [np.full((32, 32, 3), 40 * i + 40, np.uint8) for i in range(5)]
    sheet = np.asarray(overlay(frames, KeptMap(kind="video", grid=(5, 1, 1), kept=(0, 1, 2, 4))), float)
    pitch = FRAME_SIDE_PX + GAP_PX
    centres = [sheet[FRAME_SIDE_PX // 2 + i // 4 * pitch, FRAME_SIDE_PX // 2 + i % 4 * pitch, 0] for i in range(5)]
    assert centres[:3] == [40, 80, 120]
    assert centres[3] == pytest.approx((1 - DIM) * 160 + DIM * DROPPED[0], abs=1)
    assert centres[4] == 200
