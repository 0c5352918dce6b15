"""Small LLaVA checkpoints with decoders of many architectures, whose every weight is random: biases and norms too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from tests.helpers.checkpoints import TEMPLATE, tokenizer

WIDTH = 48
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}


def randomize(model: PreTrainedModel, seed: int = 0, scale: float = 1.0) -> None:
    """Draw all parameters: matrices so that signals keep their size, norms around 1, biases around 0.

    transformers starts biases at 0 and norms at 1, where many faults do not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() > 1:
                wide = "embed" in name or "head" in name
                tied = wide and model.config.get_text_config().model_type.startswith("gemma")
                parameter.copy_(noise * (0.15 if tied else 1.0 if wide else 1.5 * scale * parameter.shape[-1] ** -0.5))
            else:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.copy_(noise * 0.3 + (1.0 if is_norm else 0.0))


def random_llava_with(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a LLaVA checkpoint whose decoder is of `model_type`, with its processor."""
    words = tokenizer()
    text = AutoConfig.for_model(model_type, **{**TEXT, "vocab_size": len(words), **settings})
    text.eos_token_id, text.bos_token_id = words.eos_token_id, words.bos_token_id
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=56,
            patch_size=14,
        ),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    randomize(model)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False, crop_size=56),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder
