"""Small checkpoints of many architectures with random weights and biases, made by transformers and not by us.

Each entry of `FAMILIES` says how a configuration, a processor and a chat template of one architecture are made. All
else is shared: the model class is the one that transformers has for the configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.helpers.checkpoints import qwen_tokenizer
from tests.helpers.decoders import randomize
from tests.helpers.family import CLIP, SIGLIP, Family, ids, template, text_config, tokenizer
from tests.helpers.more_families import MORE


def llava_next(words: PreTrainedTokenizerFast) -> Any:
    return hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=text_config(words, model_type="mistral", sliding_window=None),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]],
        **ids(words, image_token_id="<image>"),
    )


def llava_next_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]],
    )
    return hf.LlavaNextProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


def llava_onevision(words: PreTrainedTokenizerFast) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config={**SIGLIP, "image_size": 56},
        text_config=text_config(words, model_type="qwen2"),
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **ids(words, image_token_id="<image>", video_token_id="<video>"),
    )


def llava_onevision_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    size = {"height": 56, "width": 56}
    images = hf.LlavaOnevisionImageProcessor(
        size=size, image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]]
    )
    return hf.LlavaOnevisionProcessor(
        images,
        words,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )


def internvl(words: PreTrainedTokenizerFast) -> Any:
    return hf.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        text_config=text_config(words, model_type="qwen3"),
        **ids(words, image_token_id="<IMG_CONTEXT>"),
    )


def internvl_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    size = {"height": 56, "width": 56}
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    return hf.InternVLProcessor(
        images, words, hf.InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=chat
    )


def mistral3(words: PreTrainedTokenizerFast) -> Any:
    return hf.Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 112,
            "patch_size": 14,
            "head_dim": 16,
        },
        text_config=text_config(words, model_type="mistral", sliding_window=None),
        spatial_merge_size=2,
        multimodal_projector_bias=True,
        **ids(words, image_token_id="[IMG]"),
    )


def pixtral_processor(words: PreTrainedTokenizerFast, chat: str, merge: int = 2) -> Any:
    images = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return hf.PixtralProcessor(images, words, patch_size=14, spatial_merge_size=merge, chat_template=chat)


def pixtral_llava(words: PreTrainedTokenizerFast) -> Any:
    whole = mistral3(words)
    return hf.LlavaConfig(
        vision_config=whole.vision_config,
        text_config=whole.text_config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **ids(words, image_token_id="[IMG]"),
    )


def aya_vision(words: PreTrainedTokenizerFast) -> Any:
    return hf.AyaVisionConfig(
        vision_config={**SIGLIP, "image_size": 56},
        text_config=text_config(words, model_type="cohere", logit_scale=0.25),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=64,
        **ids(words, image_token_id="<|IMG_PATCH|>"),
    )


AYA = (
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "TILE_GLOBAL",
    *(f"TILE_{i}" for i in range(1, 5)),
)


def aya_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return hf.AyaVisionProcessor(images, words, patch_size=14, img_size=56, downsample_factor=2, chat_template=chat)


def qwen3_vl(words: PreTrainedTokenizerFast, **more: Any) -> Any:
    media = {f"{name}_token_id": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    kind = hf.Qwen3VLMoeConfig if more else hf.Qwen3VLConfig
    return kind(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        text_config={
            **text_config(words, model_type="qwen3_vl_moe_text" if more else "qwen3_vl_text", **more),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
        **ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", **media),
    )


def qwen3_vl_moe(words: PreTrainedTokenizerFast) -> Any:
    return qwen3_vl(words, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)


def qwen3_vl_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
    return hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(size=size, patch_size=16),
        words,
        hf.Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32 * 32}),
        chat_template=chat,
    )


GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def gemma3(words: PreTrainedTokenizerFast) -> Any:
    """Windows shorter than the prompts, and a full layer; each kind of layer has rotary frequencies of its own."""
    return hf.Gemma3Config(
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        text_config=text_config(
            words,
            model_type="gemma3_text",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=20,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        mm_tokens_per_image=4,
        **ids(
            words,
            image_token_id="<image_soft_token>",
            boi_token_id="<start_of_image>",
            eoi_token_id="<end_of_image>",
        ),
    )


def gemma3_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return hf.Gemma3Processor(images, words, chat_template=chat, image_seq_length=4)


def paligemma(words: PreTrainedTokenizerFast) -> Any:
    return hf.PaliGemmaConfig(
        vision_config={**SIGLIP, "image_size": 56, "projection_dim": 48, "vision_use_head": False},
        text_config=text_config(words, model_type="gemma"),
        projection_dim=48,
        hidden_size=48,
        **ids(words, image_token_id="<image>"),
    )


def paligemma_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, words, chat_template=chat)


def cohere2_vision(words: PreTrainedTokenizerFast) -> Any:
    """Layers with windows and rotary positions, and layers with neither."""
    return hf.Cohere2VisionConfig(
        vision_config={**SIGLIP, "image_size": 56, "vision_use_head": False},
        text_config=text_config(
            words,
            model_type="cohere2",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            logit_scale=0.25,
        ),
        downsample_factor=2,
        alignment_intermediate_size=64,
        **ids(words, image_token_id="<|IMG_PATCH|>"),
    )


def cohere2_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.Cohere2VisionImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4, patch_size=2
    )
    return hf.Cohere2VisionProcessor(images, words, chat_template=chat)


GLM = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>")


def glm4v(words: PreTrainedTokenizerFast) -> Any:
    return hf.Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "image_size": 112,
            "patch_size": 14,
            "attention_bias": True,
        },
        text_config=text_config(
            words,
            model_type="glm4v_text",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        ),
        **ids(
            words,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )


def glm4v_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    return hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size=size),
        words,
        hf.Glm4vVideoProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28 * 28}),
        chat_template=chat,
    )


def perception_lm(words: PreTrainedTokenizerFast) -> Any:
    return hf.PerceptionLMConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 32, "depth": 2, "img_size": [56, 56], "num_heads": 2, "global_pool": ""},
        },
        text_config=text_config(words),
        projector_pooling_ratio=2,
        **ids(words, image_token_id="<image>", video_token_id="<video>"),
    )


def perception_lm_processor(words: PreTrainedTokenizerFast, chat: str) -> Any:
    images = hf.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4)
    clips = hf.PerceptionLMVideoProcessor(size={"height": 56, "width": 56})
    return hf.PerceptionLMProcessor(clips, images, words, patch_size=14, pooling_ratio=2, chat_template=chat)


def granite_llava(words: PreTrainedTokenizerFast) -> Any:
    """Granite's multipliers on embeddings, attention, residuals and logits."""
    return hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=text_config(
            words,
            model_type="granite",
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.5,
            logits_scaling=4.0,
        ),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]],
        **ids(words, image_token_id="<image>"),
    )


def windowed_llava_next(words: PreTrainedTokenizerFast) -> Any:
    """Mistral's window, shorter than the prompts."""
    config = llava_next(words)
    config.text_config.sliding_window = 24
    return config


QWEN = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "words": qwen_tokenizer,
}
MISTRAL = {"image": "[IMG]", "tokens": ("[IMG]", "[IMG_BREAK]", "[IMG_END]")}

FAMILIES: dict[str, Family] = {
    "llava_next": Family(llava_next, llava_next_processor),
    "llava_onevision": Family(llava_onevision, llava_onevision_processor, video="<video>"),
    "internvl": Family(
        internvl,
        internvl_processor,
        image="<IMG_CONTEXT>",
        video="<video>",
        tokens=("<img>", "</img>", "<IMG_CONTEXT>"),
        named=(
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("context_image_token", "<IMG_CONTEXT>"),
        ),
    ),
    "mistral3": Family(mistral3, pixtral_processor, **MISTRAL),
    "llava (pixtral)": Family(pixtral_llava, lambda words, chat: pixtral_processor(words, chat, 1), **MISTRAL),
    "aya_vision": Family(aya_vision, aya_processor, tokens=AYA),
    "gemma3": Family(
        gemma3,
        gemma3_processor,
        image="<start_of_image>",
        tokens=GEMMA,
        named=(
            ("image_token", "<image_soft_token>"),
            ("boi_token", "<start_of_image>"),
            ("eoi_token", "<end_of_image>"),
        ),
    ),
    "paligemma": Family(paligemma, paligemma_processor, without=("text",)),
    "cohere2_vision": Family(
        cohere2_vision,
        cohere2_processor,
        image="<|IMG_PATCH|>",
        tokens=AYA,
        named=(
            ("boi_token", "<|START_OF_IMG|>"),
            ("eoi_token", "<|END_OF_IMG|>"),
            ("image_token", "<|IMG_PATCH|>"),
            ("img_line_break_token", "<|IMG_LINE_BREAK|>"),
        ),
    ),
    "glm4v": Family(
        glm4v,
        glm4v_processor,
        image="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>",
        tokens=GLM,
        named=(("image_token", "<|image|>"), ("video_token", "<|video|>")),
        without=("picture and clip",),
    ),
    "perception_lm": Family(perception_lm, perception_lm_processor, video="<video>"),
    "llava_next (granite)": Family(granite_llava, llava_next_processor),
    "llava_next (mistral window)": Family(windowed_llava_next, llava_next_processor),
    "qwen3_vl": Family(qwen3_vl, qwen3_vl_processor, **QWEN),
    "qwen3_vl_moe": Family(qwen3_vl_moe, qwen3_vl_processor, **QWEN),
    **MORE,
}
"""Architecture, with its tower or decoder where that matters, to how it is made."""


def write(name: str, folder: Path, seed: int | None = None) -> Path:
    """Write a small checkpoint with random weights and random biases, and its processor."""
    family = FAMILIES[name]
    words = tokenizer(family)
    config = family.config(words)
    model = AutoModelForImageTextToText.from_config(config)
    randomize(model, family.seed if seed is None else seed)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # a weight that no training changes
            buffer.fill_(0.7)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    family.processor(words, template(family.image, family.video)).save_pretrained(folder)
    return folder
