"""The Qwen-VL tower: equal to transformers bit by bit for any sizes, from the tower's weights alone."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import encoders.qwen2_vl as module
import mm.models.checkpoint as checkpoint
from encoders.helpers import loading
from encoders.qwen2_vl import Qwen2VLEncoder, window_order
from mm.data.media import Image, Video
from mm.errors import CapacityError, IncompatiblePlugin, MediaError
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_llava, random_qwen2_5_vl

SIZES = [(56, 84), (91, 40), (30, 300), (200, 200), (57, 55), (56, 84)]


def picture(i: int) -> Image:
    rng = np.random.default_rng(i)
    return Image(pixels=rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8), content_hash=str(i))


def clip(num_frames: int, *, duration_s: float = 3.0, seed: int = 1) -> Video:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 70, 90, 3), dtype=np.uint8)
    times = tuple(i * duration_s / num_frames for i in range(num_frames))
    return Video(frames=frames, timestamps_s=times, duration_s=duration_s, content_hash="clip")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def folder(request, tmp_path_factory) -> Path:
    return random_qwen2_5_vl(tmp_path_factory.mktemp("qwen"), model_type=request.param)


@pytest.fixture(scope="module")
def encoder(folder) -> Qwen2VLEncoder:
    return Qwen2VLEncoder(folder)


def equal(ours, theirs) -> list[bool]:
    return [torch.equal(tokens.embeddings, rows) for tokens, rows in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("num", [1, 2, 6])
def test_images_equal_transformers_bit_by_bit(folder, encoder, num):
    """Theirs are PIL pictures through AutoProcessor, all in one call."""
    images = [picture(i) for i in range(num)]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    pils = [PIL.Image.fromarray(image.pixels) for image in images]
    inputs = processor(images=pils, text="<|image_pad|>" * num, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_image_features(inputs.pixel_values, inputs.image_grid_thw).pooler_output
    tokens = encoder.encode(images)
    assert equal(tokens, expected) == [True] * num
    assert [item.grid for item in tokens] == [(1, h // 2, w // 2) for _, h, w in inputs.image_grid_thw.tolist()]
    assert all(item.seconds_per_step is None for item in tokens)


def test_clips_equal_transformers_bit_by_bit(folder, encoder):
    clips = [clip(6), clip(3, seed=2)]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder).video_processor
    inputs = processor([item.frames for item in clips], return_tensors="pt", do_sample_frames=False)
    with torch.inference_mode():
        expected = model.get_video_features(inputs.pixel_values_videos, inputs.video_grid_thw).pooler_output
    tokens = encoder.encode(clips)
    assert equal(tokens, expected) == [True, True]
    assert [item.grid[0] for item in tokens] == [3, 2]  # two frames a step; the odd third frame fills its step twice
    assert [item.seconds_per_step for item in tokens] == [1.0, 2.0]


def test_tokens_lie_in_reading_order(encoder):
    """A patch of another colour in one cell changes that cell's token most, in a clip also in its own step."""
    frames = np.full((4, 112, 140, 3), 90, dtype=np.uint8)
    plain = Video(frames=frames, timestamps_s=(0, 1, 2, 3), duration_s=4, content_hash="plain")
    spot = frames.copy()
    spot[2:4, 56:84, 84:112] = 255  # step 1 of 2, row 2 of 4, column 3 of 5
    spotted = Video(frames=spot, timestamps_s=(0, 1, 2, 3), duration_s=4, content_hash="spot")
    before, after = encoder.encode([plain])[0], encoder.encode([spotted])[0]
    assert before.grid == (2, 4, 5)
    change = (after.embeddings - before.embeddings).norm(dim=1)
    assert after.positions[int(change.argmax())].tolist() == [1, 2, 3]


def test_only_the_tower_is_read(folder, monkeypatch):
    read: list[str] = []
    real = checkpoint.read_tensors

    def recording(path, rename):
        return real(path, lambda key: (name := rename(key)) and (read.append(key), name)[1])

    monkeypatch.setattr(loading, "read_tensors", recording)
    encoder = Qwen2VLEncoder(folder)
    assert read
    assert all(key.startswith("visual.") for key in read)
    tensors = load_file(folder / "model.safetensors")
    assert sum(p.numel() for p in encoder.tower.parameters()) == sum(tensors[key].numel() for key in read)


def test_keys_of_either_layout_load(folder, encoder, tmp_path):
    """Hub checkpoints have `visual.`, those that newer versions of transformers write may have `model.visual.`."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file({key.replace("visual.", "model.visual."): t for key, t in tensors.items()}, copy / "model.safetensors")
    assert torch.equal(
        Qwen2VLEncoder(copy).encode([picture(0)])[0].embeddings, encoder.encode([picture(0)])[0].embeddings
    )


def test_missing_weights_stop_the_load(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual.merger.mlp.0.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(checkpoint.BadCheckpoint, match=r"lacks merger\.mlp\.0\.weight"):
        Qwen2VLEncoder(copy)


def test_another_model_type_is_refused(tmp_path):
    with pytest.raises(checkpoint.BadCheckpoint, match="'llava', not one of qwen2_vl, qwen2_5_vl"):
        Qwen2VLEncoder(random_llava(tmp_path))


def test_items_keep_their_order(encoder):
    mixed = encoder.encode([picture(0), clip(2), picture(1), clip(4)])
    assert [tokens.kind for tokens in mixed] == ["image", "video", "image", "video"]
    assert [tokens.grid[0] for tokens in mixed] == [1, 1, 1, 2]
    assert torch.equal(mixed[2].embeddings, encoder.encode([picture(0), picture(1)])[1].embeddings)
    assert encoder.encode([]) == []


def sized(monkeypatch, encoder, fails) -> list[int]:
    """Record the patches of every forward pass, out of memory where `fails` says so."""
    seen: list[int] = []
    forward = encoder._forward

    def recording(items):
        seen.append(sum(len(item.pixels) for item in items))
        if fails(seen[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(items)

    monkeypatch.setattr(encoder, "_forward", recording)
    return seen


def test_many_patches_go_in_bounded_batches(encoder, monkeypatch):
    images = [picture(0)] * 5  # 2 x 3 tokens of four patches each
    whole = encoder.encode(images)
    seen = sized(monkeypatch, encoder, lambda num: False)
    monkeypatch.setattr(module, "MAX_BATCH_PATCHES", 60)
    parts = encoder.encode(images)
    assert seen == [48, 48, 24]
    assert all(torch.allclose(a.embeddings, b.embeddings, atol=1e-4) for a, b in zip(whole, parts, strict=True))
    monkeypatch.setattr(module, "MAX_BATCH_PATCHES", 10)
    seen.clear()
    encoder.encode(images[:2])
    assert seen == [24, 24]


def test_out_of_memory_halves_the_batch(encoder, monkeypatch):
    images = [picture(0)] * 5
    whole = encoder.encode(images)
    seen = sized(monkeypatch, encoder, lambda num: num > 50)
    parts = encoder.encode(images)
    assert seen == [120, 48, 72, 24, 48]
    assert all(torch.allclose(a.embeddings, b.embeddings, atol=1e-4) for a, b in zip(whole, parts, strict=True))


def test_one_item_that_does_not_fit_is_a_capacity_error(encoder, monkeypatch):
    sized(monkeypatch, encoder, lambda num: True)
    with pytest.raises(CapacityError):
        encoder.encode([picture(0), picture(1)])


def test_a_strip_is_refused_in_our_words(encoder):
    strip = Image(pixels=np.zeros((2, 402, 3), dtype=np.uint8), content_hash="strip")
    with pytest.raises(MediaError, match="more than 200 times longer"):
        encoder.encode([strip])
    thin = Video(
        frames=np.zeros((2, 2, 402, 3), dtype=np.uint8), timestamps_s=(0, 1), duration_s=2, content_hash="thin"
    )
    with pytest.raises(MediaError, match="the video is more than 200 times longer"):
        encoder.encode([thin])


def test_the_checkpoint_does_not_sample_frames_again(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "sampling")
    settings = json.loads((copy / "processor_config.json").read_text())
    settings["video_processor"] |= {"do_sample_frames": True, "fps": 1}
    (copy / "processor_config.json").write_text(json.dumps(settings))
    assert Qwen2VLEncoder(copy).encode([clip(8)])[0].grid[0] == 4


def test_the_fingerprint_names_weights_config_processors_and_dtype(folder, encoder, tmp_path):
    assert Qwen2VLEncoder(shutil.copytree(folder, tmp_path / "copy")).fingerprint == encoder.fingerprint
    others = [Qwen2VLEncoder(folder, dtype=torch.bfloat16).fingerprint]
    weights = load_file(folder / "model.safetensors")
    weights["visual.merger.mlp.0.bias"][0] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    others.append(Qwen2VLEncoder(tmp_path / "copy").fingerprint)
    for name in ("image_processor", "video_processor"):
        changed = shutil.copytree(folder, tmp_path / name)
        settings = json.loads((changed / "processor_config.json").read_text())
        settings[name]["image_mean"] = [0.1, 0.2, 0.3]
        (changed / "processor_config.json").write_text(json.dumps(settings))
        others.append(Qwen2VLEncoder(changed).fingerprint)
    assert len({encoder.fingerprint, *others}) == 5


def test_half_precision_computes_in_it(folder):
    tokens = Qwen2VLEncoder(folder, dtype=torch.bfloat16).encode([picture(0)])[0]
    assert tokens.embeddings.dtype is torch.bfloat16


def test_what_reducers_may_need(encoder):
    check_compatible(build_reducer("divprune + uniform"), encoder, "qwen")
    needy = type("Needy", (), {"needs": frozenset({"cls_attention"})})()
    with pytest.raises(IncompatiblePlugin, match="cls_attention"):
        check_compatible(needy, encoder, "qwen")


def test_threads_do_not_mix(encoder):
    images = [picture(i) for i in range(6)]
    alone = [encoder.encode([image])[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: encoder.encode([image])[0], images * 3))
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(alone * 3, together, strict=True))


NEEDS = frozenset({"attention_received", "tower_keys", "tower_features"})


@pytest.mark.parametrize("make", [lambda: picture(1), lambda: clip(4)], ids=["image", "clip"])
def test_aux_features_is_that_of_the_last_block_that_sees_whole_frames(folder, encoder, make, monkeypatch):
    """The maps are those of transformers' own eager attention, caught as it computes them."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    item = make()
    patches = encoder.image_patches(item) if isinstance(item, Image) else encoder.clip_patches(item)
    blocks = encoder.tower.blocks
    index = max(getattr(encoder.tower, "fullatt_block_indexes", None) or [len(blocks) - 1])
    maps, keys, last = [], [], []
    for modeling in (modeling_qwen2_vl, modeling_qwen2_5_vl):
        eager = modeling.eager_attention_forward

        def catching(module, *args, eager=eager, **kwargs):
            output = eager(module, *args, **kwargs)
            if module is blocks[index].attn:
                maps.append(output[1][0])
            return output

        monkeypatch.setattr(modeling, "eager_attention_forward", catching)
    handles = [
        blocks[index].attn.qkv.register_forward_hook(lambda module, args, output: keys.append(output)),
        encoder.tower.merger.register_forward_pre_hook(lambda module, args: last.append(args[0])),
    ]
    before = encoder.tower.config._attn_implementation
    encoder.tower.config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            encoder.tower(patches.pixels, grid_thw=torch.tensor([patches.grid]))
    finally:
        encoder.tower.config._attn_implementation = before
        for handle in handles:
            handle.remove()
    received = torch.cat([m.mean(dim=1) for m in maps], dim=1)
    heads = received.shape[0]
    metric = keys[0].unflatten(-1, (3, heads, -1))[:, 1].mean(dim=1).T
    order = window_order(encoder.tower, torch.tensor([patches.grid]))
    tokens, plain = encoder.encode([item], NEEDS)[0], encoder.encode([item])[0]
    assert torch.equal(tokens.embeddings, plain.embeddings)
    place = torch.arange(tokens.num_tokens) if order is None else torch.argsort(order)
    for name, plane in (("attention_received", received), ("tower_keys", metric), ("tower_features", last[0].T)):
        expected = plane.unflatten(-1, (-1, 4)).mean(dim=-1)[:, place]
        assert torch.allclose(tokens.aux_features[name], expected, atol=1e-5), name
    sums = tokens.aux_features["attention_received"].unflatten(-1, (tokens.grid[0], -1)).sum(dim=-1) * 4
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


@pytest.mark.parametrize("spec", ["visionzip", "scope", "cdpruner", "pool2", "evs", "vidcom2", "holitom", "flashvid"])
def test_reducers_work_with_what_it_supplies(encoder, spec):
    reducer = build_reducer(spec)
    check_compatible(reducer, encoder, "qwen")
    text = encoder.embed_text("what?")
    for tokens in encoder.encode([picture(1), clip(8)], reducer.needs):
        out = reduce_tokens(reducer, tokens, text)
        planned = reducer.plan(tokens.num_tokens, tokens.grid, tokens.kind)
        assert out.num_tokens == planned or (reducer.count == "bounded" and out.num_tokens < planned)
        assert (planned < tokens.num_tokens) == (tokens.kind in getattr(reducer, "kinds", ("image", "video")))


def test_merging_is_refused_by_name(encoder):
    with pytest.raises(IncompatiblePlugin, match="block_keys"):
        check_compatible(build_reducer("tome"), encoder, "qwen")
