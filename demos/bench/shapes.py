"""Checkpoints of real shapes with random weights: for speed and parity, never for accuracy.

A small byte-level tokenizer stands in for the real one; the vocabulary that is multiplied has its real size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
from transformers import LlavaForConditionalGeneration as Llava

from tests.helpers.checkpoints import TEMPLATE, tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one model: decoder, vocabulary and tower."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab: int
    image_size: int
    tower_width: int
    tower_layers: int
    tower_heads: int


SHAPES = {
    # SmolVLM-256M's decoder in LLaVA's architecture, with a small tower: its own costs ten times the decoder's prefill.
    "256m": Shape(
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        ffn=1536,
        vocab=49280,
        image_size=196,
        tower_width=192,
        tower_layers=4,
        tower_heads=3,
    ),
    "llava-1.5-7b": Shape(
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        ffn=11008,
        vocab=32064,
        image_size=336,
        tower_width=1024,
        tower_layers=24,
        tower_heads=16,
    ),
    # Qwen2.5-VL-7B's decoder (28 heads, 4 for keys and values) with the same tower.
    "qwen2.5-7b": Shape(
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        ffn=18944,
        vocab=152064,
        image_size=336,
        tower_width=1024,
        tower_layers=24,
        tower_heads=16,
    ),
}


def write_shape(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Path:
    """Write a LLaVA checkpoint of the shape, its weights drawn on `device`, to `folder`."""
    shape, words = SHAPES[name], tokenizer()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_width,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
            intermediate_size=4 * shape.tower_width,
            image_size=shape.image_size,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.ffn,
            vocab_size=shape.vocab,
            max_position_embeddings=8192,
            eos_token_id=words.eos_token_id,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Llava(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": shape.image_size, "width": shape.image_size},
            do_center_crop=False,
            crop_size=shape.image_size,
        ),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder
