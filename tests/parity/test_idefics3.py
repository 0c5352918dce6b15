"""Idefics3 and SmolVLM against transformers: the same rows into the decoder, the same tokens and logits out.

Ours: pixels -> our encoder (tower and connector only) -> splice among tags -> our layer loop. Theirs: AutoProcessor and
`generate`. Nothing is shared but the checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
)

import mm
from mm.data.tokens import Prompt
from mm.encode.pipeline import encode
from tests.helpers.checkpoints import IDEFICS_TEMPLATE, random_idefics3
from tests.helpers.passes import logits_along

NEW_TOKENS = 16
TEXT = "What colour is the circle, and where?"
SIZES = {
    "text": [],
    "one image": [(60, 80)],
    "a row of crops": [(30, 200)],
    "small and large": [(56, 56), (200, 150)],
    "three": [(224, 90), (40, 44), (40, 44)],
}


def images(name: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES[name]]


@pytest.fixture(scope="module", params=["idefics3", "idefics3 whole", "smolvlm"])
def folder(request, tmp_path_factory):
    model_type, _, whole = request.param.partition(" ")
    return random_idefics3(tmp_path_factory.mktemp("idefics"), model_type=model_type, splits=not whole)


@pytest.fixture(scope="module")
def ours(folder):
    return mm.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if model.config.model_type == "idefics3" or find_spec("num2words"):
        return model, AutoProcessor.from_pretrained(folder, local_files_only=True)
    # SmolVLM's processor cannot be made without num2words, which its clips use; on pictures this one does the same.
    parts = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return model, Idefics3Processor(*parts, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)


def our_prompt(ours, pictures, **options) -> Prompt:
    request = mm.api.build_request(TEXT, images=pictures, **options)
    visual = [item.tokens for item in encode(request, ours.encode_parts).items]
    return ours.engine.family.splice(request.messages, visual)


def our_logits(ours, prompt: Prompt, tokens: list[int]) -> list[torch.Tensor]:
    return logits_along(ours.engine.family.language, prompt, tokens)


def reference(theirs, pictures):
    model, processor = theirs
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": TEXT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=[pictures] if pictures else None, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return inputs, out.sequences[0, inputs.input_ids.shape[1] :].tolist(), [step[0] for step in out.logits]


def furthest(ours, theirs) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_tokens_and_logits_equal_generate(ours, theirs, name):
    inputs, tokens, logits = reference(theirs, images(name))
    for reducer in ("none", "divprune:keep_ratio=1"):
        prompt = our_prompt(ours, images(name), reducer=reducer)
        assert prompt.token_ids.tolist() == inputs.input_ids[0].tolist()
        assert furthest(our_logits(ours, prompt, tokens), logits) <= 1e-4  # sums in another order
    answer = ours.generate(TEXT, images=images(name), max_new_tokens=NEW_TOKENS, temperature=0)
    assert list(answer.token_ids[0]) == tokens


def test_the_decoder_gets_the_same_rows(ours, theirs):
    model, _ = theirs
    inputs, _, _ = reference(theirs, images("small and large"))
    rows = model.get_input_embeddings()(inputs.input_ids)[0].detach().clone()
    with torch.inference_mode():
        found = model.get_image_features(inputs.pixel_values, inputs.pixel_attention_mask).pooler_output
        rows[inputs.input_ids[0] == model.config.image_token_id] = torch.cat(found)
    assert torch.equal(our_prompt(ours, images("small and large")).embeddings, rows)


def test_the_comparison_notices_errors(ours, theirs):
    """Negative control: another picture changes the logits."""
    _, tokens, logits = reference(theirs, images("one image"))
    other = our_prompt(ours, images("one image", seed=9))
    assert furthest(our_logits(ours, other, tokens), logits) > 1e-2


def test_dropped_tokens_equal_masked_tokens(ours, theirs):
    """The logits behind a reduced prompt: those of transformers with the dropped rows masked. Tags stay."""
    model, _ = theirs
    whole = our_prompt(ours, images("small and large"))
    kept = our_prompt(ours, images("small and large"), reducer="random:keep_ratio=0.3")
    assert kept.next_position == whole.next_position == whole.length
    assert torch.equal(kept.positions[:, ~kept.is_visual], whole.positions[:, ~whole.is_visual])
    mask = torch.isin(whole.positions, kept.positions).long()
    assert int(mask.sum()) == kept.length < whole.length
    with torch.no_grad():
        masked = model(
            inputs_embeds=whole.embeddings.clone()[None], attention_mask=mask, position_ids=whole.positions
        ).logits[0, -1]
    logits = our_logits(ours, kept, [0])[0]
    assert float((logits - masked).abs().max()) < 1e-4 * max(1.0, float(masked.abs().max()))
