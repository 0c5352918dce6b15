"""Small checkpoints with random weights, in Hugging Face format, made by transformers and not by us."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_MEDIA = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
IDEFICS_MEDIA = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IDEFICS_MEDIA += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, some characters need several tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<pad>", "<s>", "</s>", "<image>", "<video>"]),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """As `tokenizer`, with Qwen's control tokens and without a token that begins every text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_MEDIA]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_MEDIA,
    )


def idefics_tokenizer() -> PreTrainedTokenizerFast:
    """As `tokenizer`, with the tags of crops, and one token for two line breaks as in SmolVLM's."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|endoftext|>", "<|im_start|>", *IDEFICS_MEDIA], "lines\n\n", vocab_size=360),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        additional_special_tokens=IDEFICS_MEDIA,
    )


def _byte_level(special: list[str], *more: str, vocab_size: int = 320) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    raw.train_from_iterator(
        ["USER: what colour is the circle ASSISTANT: the circle is red and blue", *more] * 4, trainer
    )
    return raw


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


def random_siglip_llava(folder: Path) -> Path:
    """Write a LLaVA checkpoint whose tower has no [CLS]."""
    random_llava(folder)
    config = LlavaConfig.from_pretrained(folder)
    config.vision_config = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=56, patch_size=14
    )
    config.vision_feature_select_strategy = "full"
    config.vision_feature_layer = -2
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def random_qwen2_5_vl(
    folder: Path,
    *,
    model_type: str = "qwen2_5_vl",
    width: int = 48,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    tower: Mapping[str, Any] = MappingProxyType({}),
    max_tokens: int = 64,
) -> Path:
    """Write a Qwen2.5-VL or Qwen2-VL checkpoint with its processors and tokenizer to `folder`.

    Real patch size, merger and windows (of 2 x 2 merged cells), few channels; pictures become 4 to `max_tokens` tokens.

    Args:
        tower: Other sizes of the tower, by the names of its configuration.
    """
    torch.manual_seed(seed)
    words = qwen_tokenizer()
    config_class, model_class, processor_class, vision = {
        "qwen2_5_vl": (
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLProcessor,
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": width,
                "fullatt_block_indexes": [1, 3],
                "window_size": 56,
                "tokens_per_second": 2,
            },
        ),
        "qwen2_vl": (
            Qwen2VLConfig,
            Qwen2VLForConditionalGeneration,
            Qwen2VLProcessor,
            {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2},
        ),
    }[model_type]
    half = width // num_heads // 2
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = config_class(
        vision_config={"depth": 4, "num_heads": 2, **vision, **tower},
        text_config={
            "hidden_size": width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "intermediate_size": 2 * width,
            "vocab_size": len(words),
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            "initializer_range": 0.3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
        },
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=tie_word_embeddings,
        **ids,
    )
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name and parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = [words.eos_token_id, words.pad_token_id]
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": max_tokens * 28 * 28}
    processor_class(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=words,
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def random_idefics3(folder: Path, *, model_type: str = "idefics3", splits: bool = True, seed: int = 0) -> Path:
    """Write an Idefics3 or SmolVLM checkpoint with its processor and tokenizer to `folder`.

    Crops of 56 pixels and four tokens; a picture has at most 4 x 4 of them and the whole. Of SmolVLM the parts are
    written without its processor, which cannot be made without another package (num2words).
    """
    torch.manual_seed(seed)
    words = idefics_tokenizer()
    config_class, model_class, image_processor_class = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor),
    }[model_type]
    config = config_class(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 56,
            "patch_size": 14,
            "initializer_range": 0.2,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": len(words),
            "max_position_embeddings": 2048,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
            "initializer_range": 0.3,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
    )
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "text_model" not in name:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    image_processor = image_processor_class(
        size={"longest_edge": 4 * 56}, max_image_size={"longest_edge": 56}, do_image_splitting=splits
    )
    if model_type == "idefics3":
        Idefics3Processor(image_processor, words, image_seq_len=4, chat_template=IDEFICS_TEMPLATE).save_pretrained(
            folder
        )
    else:
        image_processor.save_pretrained(folder)
        words.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(IDEFICS_TEMPLATE)
        (folder / "processor_config.json").write_text('{"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}')
    return folder


def random_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """As `random_idefics3`, of the other `model_type`."""
    return random_idefics3(folder, model_type="smolvlm", seed=seed)


def random_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """As `random_qwen2_5_vl`, of the other `model_type`."""
    return random_qwen2_5_vl(folder, model_type="qwen2_vl", seed=seed)


def random_video_llava(folder: Path, *, seed: int = 0) -> Path:
    """As `random_llava`, for a checkpoint that takes clips too."""
    return random_llava(folder, video=True, seed=seed)


def random_generic(folder: Path, *, seed: int = 0) -> Path:
    """A checkpoint that no encoder or family of its own takes: Qwen3-VL's, with clips and DeepStack."""
    from tests.helpers.families import write

    return write("qwen3_vl", folder, seed)


CHECKPOINTS = {
    "idefics3": random_idefics3,
    "llava": random_video_llava,
    "qwen2_5_vl": random_qwen2_5_vl,
    "qwen2_vl": random_qwen2_vl,
    "smolvlm": random_smolvlm,
    "transformers": random_generic,
}
"""`model_type` to what writes a small checkpoint of it. The contract tests need one for each encoder and family."""
