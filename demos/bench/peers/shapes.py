"""A model of a real family with random weights, large enough that reading its weights is most of a decoding step."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.helpers.checkpoints import QWEN_TEMPLATE, qwen_tokenizer

TEXT = {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 34304,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
TOWER = {
    "depth": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "intermediate_size": 2048,
    "out_hidden_size": 1024,
    "fullatt_block_indexes": [2, 5, 8, 11],
    "window_size": 112,
}


def write_qwen(folder: Path) -> Path:
    """Write a Qwen2.5-VL of 349 million parameters in float32: 251 in the decoder with its head, 98 in the tower.

    A byte-level tokenizer of 320 tokens stands in for the real one.
    """
    words = qwen_tokenizer()
    names = ("vision_start", "vision_end", "image", "video")
    pads = {"image": "image_pad", "video": "video_pad"}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{pads.get(name, name)}|>") for name in names}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config={**TEXT, **ends}, vision_config=TOWER, tie_word_embeddings=False, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1024 * 28 * 28}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=words,
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder
