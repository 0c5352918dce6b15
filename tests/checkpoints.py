"""Small checkpoints with random weights, in Hugging Face format, made by transformers and not by us."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, some characters need several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "<video>"],
        show_progress=False,
    )
    raw.train_from_iterator(["USER: what colour is the circle ASSISTANT: the circle is red and blue"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def random_llava(
    folder: Path,
    *,
    width: int = 48,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    image_size: int = 56,
    vision_feature_layer: int = -2,
    strategy: str = "default",
    video: bool = False,
    seed: int = 0,
) -> Path:
    """Write a LLaVA checkpoint with its processor and tokenizer to `folder`.

    Weights are drawn wide enough that greedy answers vary from token to token.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    extra = {"video_token_id": words.convert_tokens_to_ids("<video>"), "frame_pool_size": 2} if video else {}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=image_size,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=2 * width,
            vocab_size=len(words),
            max_position_embeddings=2048,
            eos_token_id=words.eos_token_id,
            initializer_range=0.3,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        **extra,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": image_size, "width": image_size}, do_center_crop=False, crop_size=image_size
        ),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder
