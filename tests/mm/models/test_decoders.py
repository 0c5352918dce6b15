"""Decoders of several architectures in LLaVA, with random biases: tokens equal `generate`, or it is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import mm
from mm.errors import ContextTooLong
from mm.models.folder import BadCheckpoint
from tests.helpers.decoders import random_llava_with
from tests.parity.test_generate import picture

QUESTION = "what colour is the circle and what colour is the square beside it? "
SERVED = {
    "llama": ("llama", {}),
    "llama with attention biases": ("llama", {"attention_bias": True}),
    "llama with mlp biases": ("llama", {"mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "mistral within its window": ("mistral", {"sliding_window": 256}),
    "phi3 within its window": ("phi3", {"sliding_window": 256}),
}


@pytest.mark.parametrize("name", SERVED)
def test_equals_generate(tmp_path, name):
    model_type, settings = SERVED[name]
    folder, image = random_llava_with(tmp_path, model_type, **settings), picture(1, (50, 60))
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    with mm.load(folder, dtype="float32", num_threads=1) as ours:
        answer = ours.generate(QUESTION, images=[image], max_new_tokens=12, temperature=0)
        assert list(answer.token_ids[0]) == out
        if settings.get("sliding_window"):
            assert ours.engine.family.max_context_tokens == 256
            with pytest.raises(ContextTooLong):
                ours.generate(4 * QUESTION, max_new_tokens=200)


def test_multipliers_that_are_not_computed_are_refused(tmp_path):
    folder = random_llava_with(tmp_path, "granite", embedding_multiplier=3.0)
    with pytest.raises(BadCheckpoint, match="multiplies embeddings"):
        mm.load(folder, dtype="float32")
