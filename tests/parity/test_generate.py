"""Our path against transformers: the same tokens, and in float32 the same logits but for the order of sums.

Ours: file bytes -> our encoder (tower tensors only) -> splice -> our layer loop and cache. Theirs: AutoProcessor and
`generate`. Nothing is shared but the checkpoint.
"""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mm
from mm.data.media import Image
from mm.encode.pipeline import encode
from mm.models.checkpoint import find
from tests.helpers.checkpoints import random_llava
from tests.helpers.passes import logits_along

NEW_TOKENS = 24

SHAPES = {
    "grouped heads": {"width": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
    "all heads, last tower layer": {
        "width": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "vision_feature_layer": -1,
    },
    "cls kept, larger image": {
        "width": 96,
        "num_layers": 4,
        "num_heads": 6,
        "num_kv_heads": 1,
        "strategy": "full",
        "image_size": 84,
    },
}


@pytest.fixture(scope="module", params=["tiny", *SHAPES])
def folder(request, tmp_path_factory):
    if request.param == "tiny":
        return find("tiny")
    return random_llava(tmp_path_factory.mktemp("llava"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def ours(folder):
    return mm.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def reference(theirs, images, text):
    """Tokens and per-step logits of `generate`."""
    model, processor = theirs
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images or None, text=prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, inputs.input_ids.shape[1] :].tolist(), [step[0] for step in out.logits]


def our_logits(ours, images, text, tokens, shift=0):
    """Logits at each of `tokens`, fed one by one through our cache."""
    request = mm.api.build_request(text, images=[png(image) for image in images])
    family = ours.engine.family
    prompt = family.splice(request.messages, [item.tokens for item in encode(request, ours.encode_parts).items])
    return logits_along(family.language, prompt, tokens, shift)


@pytest.mark.parametrize("sizes", [[], [(80, 60)], [(224, 224), (31, 200)]], ids=["text", "one image", "two images"])
def test_tokens_and_logits_equal_generate(ours, theirs, sizes):
    images = [picture(i, size) for i, size in enumerate(sizes)]
    text = "What colour is the circle, and where?"
    tokens, logits = reference(theirs, images, text)
    answer = ours.generate(text, images=[png(image) for image in images], max_new_tokens=NEW_TOKENS, temperature=0)
    assert list(answer.token_ids[0]) == tokens
    difference = max(
        float((a - b).abs().max()) for a, b in zip(our_logits(ours, images, text, tokens), logits, strict=True)
    )
    # Ours joins products and sums attention in another order: a few units in the last place of float32.
    assert difference <= 2e-5 * max(1.0, max(float(step.abs().max()) for step in logits))


def test_the_comparison_notices_errors(ours, theirs):
    """Negative controls: another picture, or relative positions that are off by one, change the logits."""
    images, text = [picture(0, (80, 60))], "What colour is it?"
    tokens, logits = reference(theirs, images, text)
    other = our_logits(ours, [picture(9, (80, 60))], text, tokens)
    assert max(float((a - b).abs().max()) for a, b in zip(other, logits, strict=True)) > 1e-4


def test_dropped_tokens_equal_masked_tokens(ours, theirs):
    """Reduction drops rows and keeps positions: the same as transformers with these rows masked and nothing dropped."""
    model, _ = theirs
    request = mm.api.build_request("What is it?", images=[png(picture(3, (90, 70)))], reducer="random:keep_ratio=0.3")
    full = mm.api.build_request("What is it?", images=[png(picture(3, (90, 70)))])
    family = ours.engine.family
    kept = encode(request, ours.encode_parts).items[0].tokens
    everything = encode(full, ours.encode_parts).items[0].tokens
    assert 0 < kept.num_tokens < everything.num_tokens
    prompt = family.splice(request.messages, [kept])
    whole = family.splice(full.messages, [everything])
    assert prompt.next_position == whole.next_position == whole.length
    (logits,) = logits_along(family.language, prompt, [0])
    mask = torch.isin(whole.positions, prompt.positions).long()
    assert int(mask.sum()) == prompt.length
    with torch.no_grad():
        masked = model(
            inputs_embeds=whole.embeddings.clone()[None], attention_mask=mask, position_ids=whole.positions
        ).logits[0, -1]
    assert float((logits - masked).abs().max()) < 1e-4 * max(1.0, float(masked.abs().max()))


def test_decode_goes_on_at_the_unreduced_position(ours):
    """The first generated token stands where it would without reduction."""
    full = ours.engine.family.splice(*prompt_parts(ours, "none"))
    reduced = ours.engine.family.splice(*prompt_parts(ours, "uniform:keep_ratio=0.2"))
    assert reduced.length < full.length
    assert reduced.next_position == full.next_position
    text = reduced.positions[0][~reduced.is_visual]
    assert torch.equal(text, full.positions[0][~full.is_visual])


def prompt_parts(ours, reducer):
    request = mm.api.build_request("What?", images=[png(picture(1, (50, 50)))], reducer=reducer)
    return request.messages, [item.tokens for item in encode(request, ours.encode_parts).items]


def test_clips_are_pooled_frames_in_order():
    model = mm.load("tiny", dtype="float32")
    frames = np.stack([np.asarray(picture(i, (224, 224))) for i in range(3)])
    clip = mm.media.video_from_array(frames, [0.0, 0.5, 1.0], 1.5, mm.media.MediaBudget(model.config.limits))
    request = mm.api.build_request("What happens?", videos=[clip])
    tokens = encode(request, model.encode_parts).items[0].tokens
    assert tokens.grid == (3, 8, 8)
    for i, frame in enumerate(frames):
        still = Image(pixels=frame, content_hash=str(i))
        whole = (
            model.encode_parts.encoder.encode([still])[0]
            .embeddings.reshape(8, 2, 8, 2, -1)
            .mean((1, 3))
            .reshape(64, -1)
        )
        torch.testing.assert_close(tokens.embeddings[64 * i : 64 * (i + 1)], whole)
