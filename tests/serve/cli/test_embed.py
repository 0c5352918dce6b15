"""`mm embed` from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from serve.cli.app import main

pytest.importorskip("timm")
TIMM = "timm:model_name=test_vit,image_size=64"


@pytest.fixture
def embed(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mm", "embed", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_a_timm_encoder_with_tome(embed, capsys):
    assert embed("a.png", "--encoder", TIMM, "--reducer", "tome:keep_ratio=0.5", "--out", "out.npz") == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        f"mm: {TIMM} has random weights, for tests only; give pretrained=true or checkpoint=FILE"
    ]
    assert "1 of 1 items" in shown.out
    with np.load("out.npz") as file:
        found = dict(file)
    assert (found["num_tokens_in"].tolist(), found["num_tokens"].tolist()) == ([16], [8])
    assert found["embeddings"].shape == (1, 64)


def test_the_shipped_models_own_encoder(embed, capsys):
    assert embed("a.png", "--out", "out.npz", "--threads", "1") == 0
    assert capsys.readouterr().err == ""
    with np.load("out.npz") as found:
        assert found["embeddings"].shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--out", "out.txt"], "ends in .npz"),
        (["b.png", "--out", "out.npz"], "no images or clips"),
        (["a.png", "--out", "out.npz", "--encoder", "tim"], "did you mean 'timm'"),
        (
            ["a.png", "--out", "out.npz", "--encoder", f"{TIMM},checkpoint=none.safetensors"],
            "does not hold the weights",
        ),
        (["a.png", "--out", "out.npz", "--encoder", f"{TIMM},checkpoint=none.pth"], "only .safetensors files are read"),
        (["a.png", "--out", "out.npz", "--encoder", f"{TIMM},pretrained=true"], "give checkpoint=FILE"),
        (["a.png", "--out", "out.npz", "--encoder", TIMM, "--reducer", "fastvm"], "did you mean 'fastv'"),
    ],
)
def test_mistakes_are_one_line(embed, capsys, arguments, message):
    assert embed(*arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not Path("out.npz").exists()
