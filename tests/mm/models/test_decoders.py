"""Decoders of several architectures in LLaVA, with random biases: tokens equal `generate`, or it is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

import mm
from mm.errors import ContextTooLong
from mm.models.flat_config import with_text_settings
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


def test_end_tokens_come_from_all_that_names_them(tmp_path):
    """Without generation_config.json: those of config.json, of its text model, and the end of a turn."""
    folder = random_llava_with(tmp_path, "llama")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"], config["text_config"]["eos_token_id"] = [7, 8], 9
    (folder / "config.json").write_text(json.dumps(config))
    with mm.load(folder, dtype="float32") as model:
        family = model.engine.family
        assert family.eos_token_ids == {7, 8, 9, family.tokenizer.eos_token_id}


def test_settings_beside_those_of_the_whole_model_are_not_lost():
    """The form of GLM-4.1V on the hub: transformers takes defaults for the text model."""
    flat = {
        "model_type": "glm4v",
        "eos_token_id": [5, 6],
        "hidden_size": 64,
        "max_position_embeddings": 4096,
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 3},
    }
    config = with_text_settings(AutoConfig.for_model(**flat), flat)
    text = config.text_config
    assert (text.hidden_size, text.max_position_embeddings, text.eos_token_id) == (64, 4096, [5, 6])
    assert text.rope_parameters["mrope_section"] == [2, 3, 3]
    assert text.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.vision_config.depth == 3
    whole = {"model_type": "qwen2_vl", "hidden_size": 64, "vision_config": {"depth": 3}}
    known = AutoConfig.for_model(**whole)
    assert with_text_settings(known, whole) is known, "transformers moved its settings itself"
