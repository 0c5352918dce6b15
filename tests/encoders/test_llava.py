"""The LLaVA tower: equal to transformers bit by bit, from the tower's and projector's weights alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import mm.models.checkpoint as checkpoint
from encoders.helpers.pictures import join_frames
from encoders.llava import MAX_BATCH, LlavaEncoder
from mm.data.media import Image, Video
from mm.data.tokens import VisualTokens
from mm.errors import CapacityError, IncompatiblePlugin, InvalidOption, MediaError
from mm.plugins.apply import reduce_tokens
from mm.plugins.capabilities import check_compatible
from mm.plugins.spec import build_reducer
from tests.helpers.checkpoints import random_llava, random_siglip_llava

CLS = frozenset({"cls_attention"})


def pictures(num: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures of several sizes and shapes."""
    rng = np.random.default_rng(seed)
    sizes = [(56, 56), (91, 40), (30, 120), (200, 200), (57, 55)]
    return [rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(num)]


def images(arrays: list[np.ndarray]) -> list[Image]:
    return [Image(pixels=array, content_hash=str(i)) for i, array in enumerate(arrays)]


def clip(num_frames: int, seed: int = 1) -> Video:
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 70, 60, 3), dtype=np.uint8)
    return Video(frames=frames, timestamps_s=tuple(range(num_frames)), duration_s=num_frames, content_hash="clip")


def reference(folder: Path, arrays: list[np.ndarray]) -> list[torch.Tensor]:
    """What transformers makes of the same pictures, from PIL images through AutoProcessor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return list(model.get_image_features(reference_pixels(folder, arrays)).pooler_output)


def reference_pixels(folder: Path, arrays: list[np.ndarray]) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    pils = [PIL.Image.fromarray(array) for array in arrays]
    return processor(images=pils, text="<image>" * len(pils), return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava-video"), image_size=70, video=True, vision_feature_layer=-1)


@pytest.mark.parametrize(
    ("layer", "strategy"), [(-2, "default"), (-1, "default"), (1, "default"), ([-1, 1], "default"), (-2, "full")]
)
def test_equals_transformers_bit_by_bit(tmp_path, layer, strategy):
    folder = random_llava(tmp_path, vision_feature_layer=layer, strategy=strategy)
    arrays = pictures(3)
    expected = reference(folder, arrays)
    tokens = LlavaEncoder(folder).encode(images(arrays), CLS)
    assert [torch.equal(a, b.embeddings) for a, b in zip(expected, tokens, strict=True)] == [True] * 3
    assert tokens[0].grid == ((1, 4, 4) if strategy == "default" else (1, 1, 17))


def test_pixels_equal_those_of_the_auto_processor(folder):
    arrays = pictures(5)
    assert torch.equal(LlavaEncoder(folder).preprocess(arrays), reference_pixels(folder, arrays))


def test_a_tower_without_cls(tmp_path):
    random_llava(tmp_path)
    config = LlavaConfig.from_pretrained(tmp_path)
    config.vision_config = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=56, patch_size=14
    )
    config.vision_feature_select_strategy = "full"
    config.vision_feature_layer = -1
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    encoder = LlavaEncoder(tmp_path)
    arrays = pictures(2)
    tokens = encoder.encode(images(arrays))
    assert "cls_attention" not in encoder.provides
    assert tokens[0].grid == (1, 4, 4)
    assert all(torch.equal(a, b.embeddings) for a, b in zip(reference(tmp_path, arrays), tokens, strict=True))


def _rename(folder: Path, to: Path, rename) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, to / "model.safetensors")
    return to


LAYOUTS = {
    "nested": lambda key: key.replace("vision_tower.", "vision_tower.vision_model."),
    "model prefix": lambda key: key if key.startswith(("lm_head", "language_model")) else f"model.{key}",
    "both": lambda key: f"model.{key.replace('vision_tower.', 'vision_tower.vision_model.')}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_keys_loads(folder, tmp_path, layout):
    renamed = _rename(folder, tmp_path / "renamed", LAYOUTS[layout])
    assert load_file(renamed / "model.safetensors").keys() != load_file(folder / "model.safetensors").keys()
    ours, theirs = (LlavaEncoder(path).encode(images(pictures(1)))[0] for path in (folder, renamed))
    assert torch.equal(ours.embeddings, theirs.embeddings)


def _shard(folder: Path, to: Path) -> Path:
    """The language model in one file, the rest in another."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    weight_map = {key: f"model-{1 + ('language_model' in key)}.safetensors" for key in tensors}
    for file in set(weight_map.values()):
        save_file({key: tensor for key, tensor in tensors.items() if weight_map[key] == file}, to / file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def test_only_tower_and_projector_are_read(folder, tmp_path, monkeypatch):
    sharded = _shard(folder, tmp_path / "sharded")
    opened: list[str] = []
    read: list[str] = []
    real = checkpoint.safe_open

    class Recording:
        def __init__(self, path, **options):
            opened.append(Path(path).name)
            self.reader = real(path, **options)

        def __enter__(self):
            self.reader.__enter__()
            return self

        def __exit__(self, *error):
            return self.reader.__exit__(*error)

        def keys(self):
            return self.reader.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.reader.get_tensor(key)

    monkeypatch.setattr(checkpoint, "safe_open", Recording)
    for path in (folder, sharded):
        encoder = LlavaEncoder(path)
        assert read
        assert [key for key in read if "vision_tower" not in key and "multi_modal_projector" not in key] == []
        # Features of layer -2 of 3: the third block is neither built nor read.
        assert not any("layers.2." in key for key in read)
        held = sum(p.numel() for module in (encoder.tower, encoder.projector) for p in module.parameters())
        total = sum(tensor.numel() for key, tensor in load_file(folder / "model.safetensors").items() if key in read)
        assert held == total
    assert "model-2.safetensors" not in opened  # the language model's shard is not even opened


def test_missing_weights_stop_the_load(folder, tmp_path):
    drop = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors[drop]
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(checkpoint.BadCheckpoint, match=r"lacks .*encoder\.layers\.0\.mlp\.fc1\.weight"):
        LlavaEncoder(tmp_path / "broken")


def test_another_model_type_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.BadCheckpoint, match="'llama', not one of llava"):
        LlavaEncoder(tmp_path / "other")


def test_cls_attention_is_the_row_of_the_feature_layer(folder):
    """Against the attention maps of transformers' eager attention, which the encoder itself never asks for."""
    arrays = pictures(3)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        maps = model.model.vision_tower(reference_pixels(folder, arrays), output_attentions=True).attentions
    plain = LlavaEncoder(folder).encode(images(arrays))
    tapped = LlavaEncoder(folder).encode(images(arrays), CLS)
    for i, tokens in enumerate(tapped):
        # Layer -2 is the output of block index 1 of 3.
        assert torch.allclose(tokens.aux_features["cls_attention"], maps[1][i, :, 0, 1:], atol=1e-6)
        assert torch.equal(tokens.embeddings, plain[i].embeddings)
        assert dict(plain[i].aux_features) == {}


def test_a_clip_is_its_frames_pooled_two_by_two(video_folder):
    """Grid 5 x 5: the last row and column of cells average two tokens, the corner is one."""
    encoder = LlavaEncoder(video_folder)
    video = clip(3)
    tokens = encoder.encode([video], CLS)[0]
    frames = encoder.encode(images(list(video.frames)), CLS)
    assert (tokens.grid, tokens.kind, frames[0].grid) == ((3, 3, 3), "video", (1, 5, 5))
    for position, row in zip(tokens.positions.tolist(), tokens.embeddings, strict=True):
        t, y, x = position
        cells = frames[t].embeddings.reshape(5, 5, -1)[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert torch.allclose(row, cells.flatten(0, 1).mean(dim=0), atol=1e-5)
    heads = tokens.aux_features["cls_attention"]
    assert heads.shape == (2, 27)
    cells = frames[1].aux_features["cls_attention"].reshape(2, 5, 5)[:, 2:4, 0:2]
    assert torch.allclose(heads.reshape(2, 3, 3, 3)[:, 1, 1, 0], cells.flatten(1).mean(dim=1))


def test_even_frames_pool_as_the_shipped_model_was_trained():
    frames = [VisualTokens.full(torch.randn(16, 8), (1, 4, 4), "video") for _ in range(2)]
    blocks = torch.stack([frame.embeddings for frame in frames]).view(2, 2, 2, 2, 2, 8)
    expected = blocks.mean(dim=(2, 4)).reshape(-1, 8)
    assert torch.allclose(join_frames(frames, 2).embeddings, expected, atol=1e-6)


def test_a_checkpoint_without_clips_refuses_them(folder, video_folder):
    assert LlavaEncoder(folder).kinds == {"image"}
    assert LlavaEncoder(video_folder).kinds == {"image", "video"}
    with pytest.raises(MediaError, match="does not take video"):
        LlavaEncoder(folder).encode([clip(1)])


def test_items_keep_their_order(video_folder):
    encoder = LlavaEncoder(video_folder)
    first, second = images(pictures(2))
    mixed = encoder.encode([first, clip(2), second, clip(1)])
    assert [tokens.kind for tokens in mixed] == ["image", "video", "image", "video"]
    assert torch.equal(mixed[1].embeddings, encoder.encode([clip(2)])[0].embeddings)
    assert torch.equal(mixed[2].embeddings, encoder.encode([first, second])[1].embeddings)
    assert encoder.encode([]) == []


def test_many_images_go_in_bounded_batches(folder, monkeypatch):
    encoder = LlavaEncoder(folder)
    seen = []
    forward = encoder._forward
    monkeypatch.setattr(encoder, "_forward", lambda pixels, needs: seen.append(len(pixels)) or forward(pixels, needs))
    tokens = encoder.encode(images(pictures(MAX_BATCH + 3)))
    assert seen == [MAX_BATCH, 3]
    assert torch.allclose(
        tokens[-1].embeddings, encoder.encode(images(pictures(MAX_BATCH + 3))[-1:])[0].embeddings, atol=1e-4
    )


def test_out_of_memory_halves_the_batch(folder, monkeypatch):
    encoder = LlavaEncoder(folder)
    expected = encoder.encode(images(pictures(7)))
    seen, forward = [], encoder._forward

    def tight(pixels, needs):
        seen.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels, needs)

    monkeypatch.setattr(encoder, "_forward", tight)
    tokens = encoder.encode(images(pictures(7)))
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert all(torch.allclose(a.embeddings, b.embeddings, atol=1e-4) for a, b in zip(tokens, expected, strict=True))

    def full(pixels, needs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "_forward", full)
    with pytest.raises(CapacityError):
        encoder.encode(images(pictures(2)))


def test_the_fingerprint_names_weights_config_processor_and_dtype(folder, tmp_path):
    same = LlavaEncoder(folder).fingerprint
    assert LlavaEncoder(folder).fingerprint == same
    assert LlavaEncoder(shutil.copytree(folder, tmp_path / "copy")).fingerprint == same
    others = [LlavaEncoder(folder, dtype=torch.bfloat16).fingerprint]
    weights = load_file(folder / "model.safetensors")
    weights["multi_modal_projector.linear_2.bias"][0] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    others.append(LlavaEncoder(tmp_path / "copy").fingerprint)
    changed = shutil.copytree(folder, tmp_path / "processor")
    settings = json.loads((changed / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (changed / "processor_config.json").write_text(json.dumps(settings))
    others.append(LlavaEncoder(changed).fingerprint)
    assert len({same, *others}) == 4


def test_half_precision_computes_in_it(folder):
    tokens = LlavaEncoder(folder, dtype=torch.bfloat16).encode(images(pictures(1)), CLS)[0]
    assert tokens.embeddings.dtype is torch.bfloat16
    assert tokens.aux_features["cls_attention"].dtype is torch.float32


def test_supplies_what_reducers_may_need(folder):
    check_compatible(build_reducer("divprune + uniform"), LlavaEncoder(folder), "llava")


def test_two_threads_do_not_mix(folder):
    from concurrent.futures import ThreadPoolExecutor

    encoder = LlavaEncoder(folder)
    arrays = pictures(8)
    expected = [encoder.encode(images([array]), CLS)[0] for array in arrays]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda array: encoder.encode(images([array]), CLS)[0], arrays * 3))
    for tokens, wanted in zip(found, expected * 3, strict=True):
        assert torch.allclose(tokens.embeddings, wanted.embeddings, atol=1e-5)
        assert torch.allclose(tokens.aux_features["cls_attention"], wanted.aux_features["cls_attention"], atol=1e-5)


EVERYTHING = frozenset({"cls_attention", "attention_received", "tower_keys", "tower_features"})


def block_inputs(model, pixels: torch.Tensor, block: int) -> torch.Tensor:
    """What a block's attention is given, seen by a hook on the module of transformers."""
    seen = []
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    handle = layers[block].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        tower(pixels)
    handle.remove()
    return seen[0], layers[block].self_attn


@pytest.mark.parametrize("has_cls", [True, False])
def test_aux_features_is_what_the_feature_block_computes(folder, tmp_path, has_cls):
    path = folder if has_cls else random_siglip_llava(tmp_path)
    arrays = pictures(3)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    pixels = reference_pixels(path, arrays)
    with torch.inference_mode():
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        states, attention = block_inputs(model, pixels, 1)
        keys = attention.k_proj(states).unflatten(-1, (2, -1)).mean(dim=2)
    first = 1 if has_cls else 0
    encoder = LlavaEncoder(path)
    for i, tokens in enumerate(encoder.encode(images(arrays), EVERYTHING)):
        maps = out.attentions[1][i]
        received = maps[:, 0] if has_cls else maps.mean(dim=1)
        assert torch.allclose(tokens.aux_features["attention_received"], received[:, first:], atol=1e-6)
        assert torch.allclose(tokens.aux_features["tower_keys"], keys[i, first:].T, atol=1e-5)
        assert torch.allclose(tokens.aux_features["tower_features"], out.hidden_states[2][i, first:].T, atol=1e-5)
        assert torch.equal(tokens.embeddings, encoder.encode(images(arrays))[i].embeddings)
    assert ("cls_attention" in encoder.provides) == has_cls == ("cls_attention" in tokens.aux_features)


def test_text_is_embedded_as_the_decoder_does(folder):
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ids = AutoProcessor.from_pretrained(folder).tokenizer("What is it?", add_special_tokens=False).input_ids
    encoder = LlavaEncoder(folder)
    assert len(ids) > 3
    assert torch.equal(encoder.embed_text("What is it?"), model.get_input_embeddings()(torch.tensor(ids)))
    assert encoder.embed_text("").shape == (0, model.config.text_config.hidden_size)


@pytest.mark.parametrize("spec", ["visionzip", "scope", "cdpruner", "pool2 + visionzip:keep_ratio=0.5"])
def test_reducers_work_with_what_it_supplies(folder, video_folder, tmp_path, spec):
    reducer = build_reducer(spec)
    for path, items in (
        (folder, images(pictures(2))),
        (random_siglip_llava(tmp_path), images(pictures(1))),
        (video_folder, [clip(3), *images(pictures(1))]),
    ):
        encoder = LlavaEncoder(path)
        check_compatible(reducer, encoder, "llava")
        text = encoder.embed_text("what?")
        for tokens in encoder.encode(items, reducer.needs):
            out = reduce_tokens(reducer, tokens, text)
            assert 0 < out.num_tokens == reducer.plan(tokens.num_tokens, tokens.grid, tokens.kind) < tokens.num_tokens


@pytest.mark.parametrize("has_cls", [True, False])
def test_merging_inside_the_tower(folder, tmp_path, has_cls):
    encoder = LlavaEncoder(folder if has_cls else random_siglip_llava(tmp_path))
    items = images(pictures(3))
    plain = encoder.encode(items, frozenset({"tower_features"}))
    for keep_ratio in (1.0, 0.5):
        reducer = build_reducer("tome", keep_ratio)
        check_compatible(reducer, encoder, "llava")
        found = encoder.encode(items, frozenset({"tower_features"}), merging=reducer)
        for tokens, whole in zip(found, plain, strict=True):
            assert tokens.grid == whole.grid == (1, 4, 4)
            assert tokens.num_tokens == reducer.plan(16, tokens.grid) == 16 * keep_ratio
            assert tokens.sizes.sum() == 16
            assert torch.equal(tokens.indices, tokens.indices.unique())
            expected = encoder.projector(tokens.aux_features["tower_features"].T)
            assert torch.allclose(tokens.embeddings, expected, atol=1e-5)
            if keep_ratio == 1.0:
                assert torch.allclose(tokens.embeddings, whole.embeddings, atol=1e-5)
                assert torch.allclose(
                    tokens.aux_features["tower_features"], whole.aux_features["tower_features"], atol=1e-5
                )
    alone = encoder.encode(items[1:2], merging=reducer)[0]
    assert torch.equal(alone.indices, found[1].indices)
    assert torch.allclose(alone.embeddings, found[1].embeddings, atol=1e-5)


def test_copies_in_a_picture_merge_without_loss(folder):
    """Patches of one colour differ by their position embedding alone; without it a mean is what its members are."""
    encoder = LlavaEncoder(folder)
    encoder.tower.embeddings.position_embedding.weight.data.zero_()
    flat = Image(pixels=np.full((56, 56, 3), 90, dtype=np.uint8), content_hash="")
    plain = encoder.encode([flat])[0]
    merged = encoder.encode([flat], merging=build_reducer("tome", 0.25))[0]
    assert merged.num_tokens == 4
    assert torch.allclose(merged.embeddings, plain.embeddings[merged.indices], atol=1e-5)


def test_what_merging_needs_is_named(folder, video_folder, tmp_path):
    tome = build_reducer("tome")
    with pytest.raises(IncompatiblePlugin, match="attention_received with tome in its tower"):
        check_compatible(build_reducer("tome + scope"), LlavaEncoder(folder), "llava")
    check_compatible(build_reducer("tome + cdpruner"), LlavaEncoder(folder), "llava")
    several = random_llava(tmp_path, vision_feature_layer=[-1, 1])
    with pytest.raises(IncompatiblePlugin, match="block_keys"):
        check_compatible(tome, LlavaEncoder(several), "llava")
    with pytest.raises(IncompatiblePlugin, match="tome cannot be used with clips of this model"):
        LlavaEncoder(video_folder).encode([clip(2)], merging=tome)
    with pytest.raises(InvalidOption, match="one reducer before or inside the tower"):
        check_compatible(build_reducer("tome + tome"), LlavaEncoder(folder), "llava")


def test_a_transformers_that_names_layers_and_not_states_gives_the_same_tokens(folder, monkeypatch):
    """Before 5.20 a list of hidden states named layers, so that every state is asked for there."""
    encoder, items = LlavaEncoder(folder), images(pictures(2))
    expected = [tokens.embeddings for tokens in encoder.encode(items)]
    monkeypatch.setattr("encoders.helpers.hidden_states.SELECTS", False)
    asked: list[object] = []
    forward = encoder.tower.forward
    monkeypatch.setattr(
        encoder.tower,
        "forward",
        lambda *args, **kw: (asked.append(kw["output_hidden_states"]), forward(*args, **kw))[1],
    )
    found = [tokens.embeddings for tokens in encoder.encode(items)]
    assert asked
    assert all(one is True for one in asked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def clip_of(folder: Path, width: int = 32) -> CLIPModel:
    """A random CLIP for the tower of a checkpoint, in its folder `clip`."""
    torch.manual_seed(3)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"hidden_size": 24, "vocab_size": len(tokenizer), "max_position_embeddings": 8, **small, **ends}
    vision = {"hidden_size": width, "image_size": 56, "patch_size": 14, **small}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return model


def test_clip_embeddings_and_text_are_those_of_clip(tmp_path):
    """Of a question that is longer than CLIP's context too: pieces, of which the last is filled up."""
    folder = random_llava(tmp_path)
    before = LlavaEncoder(folder)
    model, tokenizer = clip_of(folder), AutoTokenizer.from_pretrained(folder)
    encoder, item = LlavaEncoder(folder), images(pictures(1))
    features = encoder.encode(item, frozenset({"tower_features"}))[0].aux_features["tower_features"].mT
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model.post_layernorm(features))
        question = "what is this red thing on the left of the picture?"
        ids = [tokenizer.bos_token_id, *tokenizer(question, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        pieces = [ids[i : i + 8] for i in range(0, len(ids), 8)]
        assert len(pieces) > 1
        rows = [
            model.text_projection(
                model.text_model(torch.tensor([piece]), attention_mask=torch.ones(1, len(piece))).pooler_output
            )
            for piece in pieces
        ]
    found = encoder.encode(item, frozenset({"clip_embeddings"}))[0].aux_features["clip_embeddings"]
    torch.testing.assert_close(found.mT, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.embed_clip_text(question), torch.cat(rows), rtol=1e-4, atol=1e-5)
    assert encoder.embed_clip_text("").shape == (0, 16)
    assert encoder.fingerprint != before.fingerprint
    reducer = build_reducer("cdpruner:keep_ratio=0.25,relevance=clip")
    with pytest.raises(IncompatiblePlugin, match=r"clip_embeddings, clip_text .*folder `clip`"):
        check_compatible(reducer, before, "the encoder")
    check_compatible(reducer, encoder, "the encoder")


def test_cdpruner_with_clip_keeps_what_the_authors_equations_say(tmp_path):
    """At every step the token that adds most to the determinant of their kernel, by its definition."""
    folder = random_llava(tmp_path)
    clip_of(folder)
    encoder = LlavaEncoder(folder)
    tokens = encoder.encode(images(pictures(1)), frozenset({"clip_embeddings"}))[0]
    text = encoder.embed_clip_text("a red thing?")
    unit = torch.nn.functional.normalize(tokens.embeddings.double(), dim=-1)
    seen = torch.nn.functional.normalize(tokens.aux_features["clip_embeddings"].mT.double(), dim=-1)
    score = -(seen @ torch.nn.functional.normalize(text.double(), dim=-1).T).mean(1)
    score = (score - score.min() + 1e-6) / (score.max() - score.min())
    kernel = score[:, None] * (unit @ unit.T) * score
    chosen: list[int] = []
    for _ in range(4):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    kept = reduce_tokens(build_reducer("cdpruner:keep_ratio=0.25,relevance=clip"), tokens, None, text)
    assert kept.indices.tolist() == sorted(chosen)
    away = reduce_tokens(build_reducer("cdpruner:keep_ratio=0.25,relevance=clip,relevance_sign=1"), tokens, None, text)
    assert away.indices.tolist() != sorted(chosen)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda clip: clip_of(clip.parent, width=48), "48 wide"),
        (lambda clip: (clip / "model.safetensors").unlink(), "safetensors"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_by_name(tmp_path, damage, message):
    folder = random_llava(tmp_path)
    clip_of(folder)
    damage(folder / "clip")
    with pytest.raises(checkpoint.BadCheckpoint, match=message):
        LlavaEncoder(folder).embed_clip_text("a")
