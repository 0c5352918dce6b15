"""Decoders of several architectures in LLaVA, with random biases: tokens equal `generate`, or it is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

import mm
from mm.errors import ContextTooLong, InvalidRequest
from mm.models.families.llava import Llava
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
    "mistral beyond its window": ("mistral", {"sliding_window": 32}),
    "phi3 beyond its window": ("phi3", {"sliding_window": 32}),
    "qwen2 with a window in some layers": (
        "qwen2",
        {
            "sliding_window": 32,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "granite with multipliers": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "cohere with a logit scale": ("cohere", {"logit_scale": 0.25}),
    "gemma2 with bounds": ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 20, "head_dim": 12}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
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


def test_rotary_embeddings_that_depend_on_the_longest_request_end_where_they_change(tmp_path):
    """Phi-3's longrope takes other factors beyond its first context, for all requests of a step."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    folder = random_llava_with(
        tmp_path,
        "phi3",
        sliding_window=None,
        original_max_position_embeddings=256,
        rope_parameters={**factors, "rope_theta": 10000.0, "original_max_position_embeddings": 256},
    )
    with mm.load(folder, dtype="float32", num_threads=1) as ours:
        assert ours.engine.family.max_context_tokens == 256
        with pytest.raises(ContextTooLong):
            ours.generate(4 * QUESTION, max_new_tokens=200)


@pytest.mark.parametrize("name", ["mistral beyond its window"])
def test_dropping_inside_the_decoder_beyond_a_window_is_refused(tmp_path, name):
    model_type, settings = SERVED[name]
    folder = random_llava_with(tmp_path, model_type, **settings)
    with (
        mm.load(folder, dtype="float32", num_threads=1) as ours,
        pytest.raises(InvalidRequest, match="layers that see"),
    ):
        ours.generate(QUESTION, images=[picture(1, (50, 60))], reducer="fastv:keep_ratio=0.5,layer=1")


def test_layers_without_a_cache_of_their_kind_are_refused_by_name(tmp_path):
    folder = random_llava_with(tmp_path, "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention", "linear_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"linear_attention|layer_types"):
        mm.load(folder, dtype="float32")


def test_quantised_checkpoints_are_refused_before_weights_are_read(tmp_path):
    folder = random_llava_with(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(BadCheckpoint, match="awq"):
        Llava(folder)


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
