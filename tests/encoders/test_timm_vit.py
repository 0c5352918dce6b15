"""A tower of timm equals timm's own features, without the prefix tokens."""

from __future__ import annotations

import sys

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from encoders.timm_vit import TimmEncoder
from mm.data.media import Image, Video
from mm.errors import IncompatiblePlugin, InvalidOption, PluginError
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import check_compatible
from mm.plugins.registry import create
from mm.plugins.spec import build_reducer

timm = pytest.importorskip("timm")
SIZE = 64


def picture(seed: int, height: int = 50, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def features(encoder: TimmEncoder, pictures: list[np.ndarray]) -> torch.Tensor:
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=encoder.model)
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = torch.stack([transform(PIL.Image.fromarray(array)) for array in pictures])
    with torch.inference_mode():
        return encoder.model.forward_features(pixels)


@pytest.mark.parametrize(("name", "num_prefix"), [("test_vit", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_equals_timm_without_prefix_tokens(name, num_prefix):
    encoder = TimmEncoder(name, image_size=SIZE)
    pictures = [picture(0), picture(1, 64, 64)]
    tokens = encoder.encode([Image(pixels=array, content_hash="") for array in pictures])
    expected = features(encoder, pictures)
    assert expected.shape[1] == num_prefix + 16
    assert all(torch.equal(a.embeddings, b[num_prefix:]) for a, b in zip(tokens, expected, strict=True))
    assert tokens[0].grid == (1, 4, 4)


def test_a_clip_is_its_frames_and_can_be_reduced():
    encoder = create("encoder", "timm", model_name="test_vit", image_size=SIZE)
    frames = np.stack([picture(seed) for seed in range(3)])
    video = Video(frames=frames, timestamps_s=(0.0, 1.0, 2.0), duration_s=3.0, content_hash="")
    image = Image(pixels=frames[0], content_hash="")
    first, clip = encoder.encode([image, video])
    assert (clip.grid, clip.kind, clip.num_tokens) == ((3, 4, 4), "video", 48)
    assert torch.allclose(clip.embeddings[:16], first.embeddings, atol=1e-5)
    assert reduce_tokens(build_reducer("divprune:keep_ratio=0.25"), clip).num_tokens == 12
    assert encoder.encode([]) == []


def test_weights_come_from_a_file_and_name_the_encoder(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=0, img_size=SIZE)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = {"checkpoint": tmp_path / "weights.safetensors", "image_size": SIZE}
    first, second = (TimmEncoder("test_vit", **options) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.model.pos_embed, model.pos_embed)
    assert TimmEncoder("test_vit", image_size=SIZE).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet18", None, "no ViT"),
        ("test_convnext", None, "no ViT"),
        ("resnet18", 64, "cannot be built for it"),
        ("vit_tiny_patch16_225", None, "did you mean 'vit_"),
    ],
)
def test_what_is_no_vit_is_refused(name, size, message):
    with pytest.raises(InvalidOption, match=message):
        TimmEncoder(name, image_size=size)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PluginError, match=r"mm-serving\[timm\]"):
        TimmEncoder("test_vit")


def test_merging_inside_the_tower():
    """Without merging it equals timm's own forward pass; with it each frame of a clip merges by itself."""
    encoder = TimmEncoder("test_vit", image_size=SIZE)
    frames = np.stack([picture(seed) for seed in range(3)])
    video = Video(frames=frames, timestamps_s=(0.0, 1.0, 2.0), duration_s=3.0, content_hash="")
    image = Image(pixels=frames[1], content_hash="")
    check_compatible(build_reducer("tome"), encoder, "timm")
    plain = encoder.encode([image, video])
    whole = encoder.encode([image, video], merging=build_reducer("tome", 1.0))
    for a, b in zip(plain, whole, strict=True):
        assert torch.allclose(a.embeddings, b.embeddings, atol=1e-5)
        assert torch.equal(a.positions, b.positions)
    reducer = build_reducer("tome", 0.5)
    first, clip = encoder.encode([image, video], frozenset({"tower_features"}), merging=reducer)
    assert clip.num_tokens == 24 == reducer.plan(48, clip.grid, "video")
    assert clip.grid == (3, 4, 4)
    assert torch.equal(clip.indices, clip.indices.unique())
    assert torch.equal(clip.indices[8:16] - 16, first.indices)
    assert torch.equal(clip.aux_features["tower_features"], clip.embeddings.T)
    assert reduce_tokens(reducer, clip).num_tokens == 24
    assert reduce_tokens(build_reducer("tome:keep_ratio=0.5 + divprune:keep_ratio=0.25"), clip).num_tokens == 6


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_tokens_in_front_stay_out_of_merging(name):
    size = SIZE if "16" in name else 56
    encoder = TimmEncoder(name, image_size=size)
    image = Image(pixels=picture(0), content_hash="")
    plain, whole = encoder.encode([image])[0], encoder.encode([image], merging=build_reducer("tome", 1.0))[0]
    assert torch.allclose(plain.embeddings, whole.embeddings, atol=1e-4)
    assert encoder.encode([image], merging=build_reducer("tome", 0.25))[0].sizes.sum() == plain.num_tokens


def test_a_tower_of_other_blocks_refuses_to_merge():
    encoder = TimmEncoder("eva02_tiny_patch14_224", image_size=56)
    with pytest.raises(IncompatiblePlugin, match="block_keys"):
        check_compatible(build_reducer("tome"), encoder, "eva02")
