"""`mm embed`: vectors of pictures and clips, by any encoder that can be built by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import mm
from mm.api import build_request
from mm.build import build_encode_parts
from mm.config import ModelConfig, SourcePolicy
from mm.encode.pipeline import encode
from mm.encode.pooling import mean_embedding
from mm.errors import IncompatiblePlugin, InvalidOption, InvalidRequest, UnknownPlugin
from serve.jobs.embed import EmbedJob, run_embed
from serve.jobs.job import JobError
from tests.helpers.checkpoints import random_llava
from tests.helpers.clips import clip_bytes

timm = pytest.importorskip("timm")
TIMM = "timm:model_name=test_vit,image_size=64"
CONFIG = ModelConfig(dtype="float32", sources=SourcePolicy(allow_paths=True), num_frames=4)


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    (tmp_path / "clip.mp4").write_bytes(clip_bytes(num_frames=8))
    return tmp_path


def embed(folder: Path, encoder: str | None = TIMM, **config) -> tuple[int, dict[str, np.ndarray]]:
    out = folder / "out.npz"
    model = ModelConfig(**{"dtype": "float32", "sources": CONFIG.sources, "num_frames": 4} | config)
    code = run_embed(EmbedJob(inputs=(str(folder),), out=out, model=model, encoder=encoder))
    if not out.exists():
        return code, {}
    with np.load(out, allow_pickle=False) as found:
        return code, dict(found)


def test_pictures_and_clips_by_timm(folder, capsys):
    torch.manual_seed(0)
    code, found = embed(folder)
    assert code == 0
    assert [Path(path).name for path in found["paths"]] == ["0.png", "1.png", "clip.mp4"]
    assert found["kinds"].tolist() == ["image", "image", "video"]
    assert found["num_tokens"].tolist() == found["num_tokens_in"].tolist() == [16, 16, 4 * 16]
    assert (found["embeddings"].dtype, len(found["embeddings"])) == (np.float32, 3)
    assert str(found["encoder"]) == TIMM
    assert str(found["reducer"]) == "none"
    torch.manual_seed(0)
    parts = build_encode_parts(CONFIG, TIMM)
    pixels = mm.read_media(folder / "1.png").frames[0]
    (item,) = encode(build_request("", images=[pixels]), parts).items
    assert np.array_equal(found["embeddings"][1], item.tokens.embeddings.mean(dim=0).numpy())
    assert "has random weights" in capsys.readouterr().err


@pytest.mark.parametrize("reducer", ["tome:keep_ratio=0.5", "uniform:keep_ratio=0.5"])
def test_a_reducer_acts_inside_or_after_the_tower(folder, reducer):
    _, found = embed(folder, reducer=reducer)
    assert found["num_tokens"].tolist() == [8, 8, 4 * 8]
    assert found["num_tokens_in"].tolist() == [16, 16, 4 * 16]
    assert str(found["reducer"]).startswith(reducer)


def test_weights_from_a_file_are_not_called_random(folder, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0, img_size=64).state_dict(), weights)
    code, found = embed(folder, f"{TIMM},checkpoint={weights}")
    assert code == 0
    again = embed(folder, f"{TIMM},checkpoint={weights}")[1]
    assert np.array_equal(found["embeddings"], again["embeddings"])
    assert "random" not in capsys.readouterr().err


def test_a_checkpoints_own_encoder(folder):
    checkpoint = random_llava(folder / "model", video=True)
    code, found = embed(folder, None, model=str(checkpoint))
    assert code == 0
    parts = build_encode_parts(ModelConfig(model=str(checkpoint), dtype="float32", sources=CONFIG.sources))
    media = encode(build_request("", images=[folder / "0.png"]), parts)
    assert np.array_equal(found["embeddings"][0], mean_embedding(media).numpy())


def test_what_cannot_be_embedded_is_named_and_the_rest_is_written(folder, capsys):
    (folder / "0.png").write_bytes(b"broken")
    code, found = embed(folder)
    assert code == 3
    assert [Path(path).name for path in found["paths"]] == ["1.png", "clip.mp4"]
    assert "0.png: the image cannot be decoded" in capsys.readouterr().err
    for name in ("1.png", "clip.mp4"):
        (folder / name).write_bytes(b"broken")
    (folder / "out.npz").unlink()
    assert embed(folder) == (1, {})


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        ("tim:model_name=test_vit", UnknownPlugin, "did you mean 'timm'"),
        ("timm", InvalidOption, "model_name"),
        ("timm:modelname=test_vit", InvalidOption, "did you mean 'model_name'"),
        ("timm:model_name=test_vit + timm:model_name=test_vit", InvalidOption, "several"),
        ("timm:model_name=test_vit,device=cpu", InvalidOption, "does not exist"),
    ],
)
def test_a_wrong_encoder_is_refused(folder, encoder, error, message):
    with pytest.raises(error, match=message):
        embed(folder, encoder)


def test_a_reducer_that_the_encoder_cannot_serve_is_refused(folder):
    with pytest.raises(IncompatiblePlugin, match=r"cls_attention|attention_received"):
        embed(folder, reducer="visionzip")


def test_a_bad_output_or_empty_input_is_refused_before_loading(folder):
    for out in (folder / "out.txt", folder / "none" / "out.npz"):
        with pytest.raises(JobError):
            EmbedJob(inputs=(str(folder),), out=out)
    with pytest.raises(JobError, match="no images or clips"):
        run_embed(EmbedJob(inputs=(str(folder / "*.jpg"),), out=folder / "out.npz", encoder="nothing"))


def test_no_media_has_no_embedding():
    with pytest.raises(InvalidRequest, match="at least one"):
        mean_embedding(encode(build_request("a"), build_encode_parts(CONFIG, TIMM)))
