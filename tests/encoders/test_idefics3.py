"""The Idefics3 tower: equal to transformers bit by bit, crop by crop, from tower and connector alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

import mm.models.checkpoint as checkpoint
from encoders.helpers import loading
from encoders.idefics3 import Idefics3Encoder
from mm.data.media import Image, Video
from mm.errors import CapacityError, IncompatiblePlugin, MediaError
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_idefics3, random_llava

SIZES = [(56, 56), (30, 200), (200, 150), (90, 224)]


def picture(i: int) -> Image:
    pixels = np.random.default_rng(i).integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8)
    return Image(pixels=pixels, content_hash=str(i))


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def folder(request, tmp_path_factory) -> Path:
    return random_idefics3(tmp_path_factory.mktemp("idefics"), model_type=request.param)


@pytest.fixture(scope="module")
def encoder(folder) -> Idefics3Encoder:
    return Idefics3Encoder(folder)


@pytest.mark.parametrize("num", [1, 4])
def test_images_equal_transformers_bit_by_bit(folder, encoder, num):
    """Theirs are padded to one number of crops, and unpadded again inside the model."""
    images = [picture(i) for i in range(num)]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor([[image.pixels] for image in images], return_row_col_info=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_image_features(inputs.pixel_values, inputs.pixel_attention_mask).pooler_output
    tokens = encoder.encode(images)
    assert [torch.equal(a.embeddings, b) for a, b in zip(tokens, expected, strict=True)] == [True] * num
    found = [item.crops for item in tokens]
    assert found == [(r, c) if r else None for (r,), (c,) in zip(inputs.rows, inputs.cols, strict=True)]


def test_steps_are_crops_row_by_row_and_then_the_whole(encoder):
    """A bright spot in the crop of row 2, column 3 changes that step and the whole picture's, and no other."""
    plain = np.full((112, 224, 3), 90, dtype=np.uint8)
    spot = plain.copy()
    spot[56:112, 112:168] = 255
    before, after = (encoder.encode([Image(pixels=p, content_hash="x")])[0] for p in (plain, spot))
    assert before.grid == (9, 2, 2)
    assert before.crops == (2, 4)
    change = (after.embeddings - before.embeddings).norm(dim=1).reshape(9, 4).amax(dim=1)
    assert torch.nonzero(change > 1e-3).flatten().tolist() == [6, 8]


def test_a_picture_of_one_crop_has_no_crops(folder, tmp_path):
    whole = random_idefics3(tmp_path, splits=False)
    tokens = Idefics3Encoder(whole).encode([picture(2)])[0]
    assert (tokens.grid, tokens.crops) == ((1, 2, 2), None)


def test_clips_are_refused(encoder):
    clip = Video(frames=np.zeros((2, 56, 56, 3), dtype=np.uint8), timestamps_s=(0, 1), duration_s=2, content_hash="c")
    assert encoder.kinds == {"image"}
    with pytest.raises(MediaError, match="does not take video"):
        encoder.encode([clip])
    assert encoder.encode([]) == []


def test_only_tower_and_connector_are_read(folder, monkeypatch):
    read: list[str] = []
    real = checkpoint.read_tensors

    def recording(path, rename):
        return real(path, lambda key: (name := rename(key)) and (read.append(key), name)[1])

    monkeypatch.setattr(loading, "read_tensors", recording)
    encoder = Idefics3Encoder(folder)
    tensors = load_file(folder / "model.safetensors")
    held = sum(p.numel() for part in (encoder.tower, encoder.connector) for p in part.parameters())
    assert held == sum(tensors[key].numel() for key in read) > 0
    assert {key.split(".")[1] for key in read} == {"vision_model", "connector"}


def test_missing_weights_and_other_models_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.connector.modality_projection.proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(checkpoint.BadCheckpoint, match=r"lacks modality_projection\.proj\.weight"):
        Idefics3Encoder(copy)
    with pytest.raises(checkpoint.BadCheckpoint, match="'llava', not one of idefics3, smolvlm"):
        Idefics3Encoder(random_llava(tmp_path / "llava"))


def test_many_crops_go_in_bounded_batches(encoder, monkeypatch):
    images = [picture(i) for i in range(4)]
    whole = encoder.encode(images)
    seen, forward = [], encoder._forward

    def tight(pictures):
        seen.append(sum(len(item.pixels) for item in pictures))
        if seen[-1] > 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pictures)

    monkeypatch.setattr(encoder, "_forward", tight)
    sizes = [len(encoder.prepare(image).pixels) for image in images]
    assert sizes == [17, 5, 13, 9]
    with pytest.raises(CapacityError):
        encoder.encode(images)
    seen.clear()
    parts = encoder.encode(images[1:])
    assert seen == [27, 5, 22, 13, 9]
    assert all(torch.allclose(a.embeddings, b.embeddings, atol=1e-4) for a, b in zip(whole[1:], parts, strict=True))


def test_the_fingerprint_names_weights_processor_and_dtype(folder, encoder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert Idefics3Encoder(copy).fingerprint == encoder.fingerprint
    others = [Idefics3Encoder(folder, dtype=torch.bfloat16).fingerprint]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.connector.modality_projection.proj.weight"][0, 0] += 1e-3
    save_file(tensors, copy / "model.safetensors")
    others.append(Idefics3Encoder(copy).fingerprint)
    changed = shutil.copytree(folder, tmp_path / "changed")
    name = next(n for n in ("preprocessor_config.json", "processor_config.json") if (changed / n).is_file())
    settings = json.loads((changed / name).read_text())
    settings.get("image_processor", settings)["image_mean"] = [0.1, 0.2, 0.3]
    (changed / name).write_text(json.dumps(settings))
    others.append(Idefics3Encoder(changed).fingerprint)
    assert len({encoder.fingerprint, *others}) == 4


NEEDS = frozenset({"attention_received", "tower_keys", "tower_features"})


def test_aux_features_is_that_of_the_last_block_within_each_crop(folder, encoder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tower = model.model.vision_model
    image = picture(1)
    pixels = encoder.prepare(image).pixels
    with torch.inference_mode():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        block = tower.encoder.layers[-1]
        keys = block.self_attn.k_proj(block.layer_norm1(out.hidden_states[len(tower.encoder.layers) - 1]))
    keys = keys.unflatten(-1, (block.self_attn.num_heads, -1)).mean(dim=2)
    tokens, plain = encoder.encode([image], NEEDS)[0], encoder.encode([image])[0]
    assert torch.equal(tokens.embeddings, plain.embeddings)
    side, scale = pixels.shape[-1] // tower.patch_size, encoder.config.scale_factor
    expected = {
        "attention_received": out.attentions[-1].mean(dim=2),
        "tower_keys": keys.mT,
        "tower_features": out.last_hidden_state.mT,
    }
    for name, plane in expected.items():
        found = tokens.aux_features[name]
        assert found.shape[-1] == tokens.num_tokens
        for token in (0, 1, tokens.num_tokens - 1):
            crop, y, x = tokens.positions[token].tolist()
            patches = plane[crop].unflatten(-1, (side, side))
            cell = patches[:, y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
            assert torch.allclose(found[:, token], cell.mean(dim=(1, 2)), atol=1e-5)


@pytest.mark.parametrize("spec", ["visionzip", "scope", "cdpruner", "pool2"])
def test_reducers_work_crop_by_crop(encoder, spec):
    reducer = build_reducer(spec)
    check_compatible(reducer, encoder, "idefics3")
    tokens = encoder.encode([picture(2)], reducer.needs)[0]
    out = reduce_tokens(reducer, tokens, encoder.embed_text("what?"))
    assert out.num_tokens == reducer.plan(tokens.num_tokens, tokens.grid, tokens.kind)
    assert set(out.positions[:, 0].tolist()) == set(range(tokens.grid[0]))


def test_merging_is_refused_by_name(encoder):
    with pytest.raises(IncompatiblePlugin, match="block_keys"):
        check_compatible(build_reducer("tome"), encoder, "idefics3")
