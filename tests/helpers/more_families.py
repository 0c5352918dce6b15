"""Further architectures, made small as those of `tests.helpers.families`."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedTokenizerFast

from tests.helpers.checkpoints import qwen_tokenizer
from tests.helpers.family import CLIP, SIGLIP, Family, ids, text_config

Words = PreTrainedTokenizerFast

SIZE = {"height": 56, "width": 56}
EDGES = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
CLIP_EDGES = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28 * 28}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
PATCHES = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 48}


def clip_images(edge: int = 28) -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


def vipllava(words: Words) -> Any:
    return hf.VipLlavaConfig(
        vision_config=CLIP,
        text_config=text_config(words),
        vision_feature_layer=[-1, -2],
        **ids(words, image_token_id="<image>"),
    )


def llava_processor(words: Words, chat: str) -> Any:
    return hf.LlavaProcessor(
        clip_images(),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


def video_llava(words: Words) -> Any:
    return hf.VideoLlavaConfig(
        vision_config=CLIP,
        text_config=text_config(words),
        **ids(words, image_token_id="<image>", video_token_id="<video>"),
    )


def video_llava_processor(words: Words, chat: str) -> Any:
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return hf.VideoLlavaProcessor(
        hf.VideoLlavaImageProcessor(**crop),
        hf.VideoLlavaVideoProcessor(**crop),
        words,
        patch_size=14,
        chat_template=chat,
    )


GRIDS = [[56, 112], [112, 56], [112, 112]]


def llava_next_video(words: Words) -> Any:
    return hf.LlavaNextVideoConfig(
        vision_config={**CLIP, "image_size": 56},
        text_config=text_config(words),
        image_grid_pinpoints=GRIDS,
        **ids(words, image_token_id="<image>", video_token_id="<video>"),
    )


def llava_next_video_processor(words: Words, chat: str) -> Any:
    crop = {"size": {"shortest_edge": 56}, "crop_size": SIZE}
    return hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(**crop),
        hf.LlavaNextImageProcessor(image_grid_pinpoints=GRIDS, **crop),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 16,
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
}


def got_ocr2(words: Words) -> Any:
    return hf.GotOcr2Config(
        vision_config={**SAM, "image_size": 256, "patch_size": 4, "window_size": 8, "global_attn_indexes": []},
        text_config=text_config(words, model_type="qwen2"),
        image_seq_length=256,
        **ids(words, image_token_id="<imgpad>"),
    )


def got_ocr2_processor(words: Words, chat: str) -> Any:
    images = hf.GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    return hf.GotOcr2Processor(images, words, chat_template=chat)


OVIS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def ovis2(words: Words) -> Any:
    return hf.Ovis2Config(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 56,
            "patch_size": 14,
            "vocab_size": 32,
            "hidden_stride": 2,
        },
        text_config=text_config(words, model_type="qwen2"),
        visual_indicator_token_ids=[words.convert_tokens_to_ids(token) for token in OVIS],
        hidden_size=48,
        vocab_size=len(words),
        **ids(words, image_token_id="<IMG_ATOM>"),
    )


def ovis2_processor(words: Words, chat: str) -> Any:
    images = hf.Ovis2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    return hf.Ovis2Processor(images, words, image_seq_length=4, chat_template=chat)


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 112,
    "patch_size": 14,
    "head_dim": 16,
}


def lighton_ocr(words: Words) -> Any:
    return hf.LightOnOcrConfig(
        vision_config=PIXTRAL,
        text_config=text_config(words, model_type="qwen3"),
        spatial_merge_size=2,
        **ids(words, image_token_id="<image>"),
    )


def lighton_ocr_processor(words: Words, chat: str) -> Any:
    images = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28})
    return hf.LightOnOcrProcessor(images, words, patch_size=14, spatial_merge_size=2, chat_template=chat)


def qianfan_ocr(words: Words) -> Any:
    return hf.QianfanOCRConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        text_config=text_config(words, model_type="qwen3"),
        image_seq_length=4,
        **ids(words, image_token_id="<IMG_CONTEXT>"),
    )


def qianfan_ocr_processor(words: Words, chat: str) -> Any:
    images = hf.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    return hf.QianfanOCRProcessor(images, words, image_seq_length=4, chat_template=chat)


def deepseek_vl(words: Words) -> Any:
    return hf.DeepseekVLConfig(
        vision_config={**SIGLIP, "image_size": 56},
        text_config=text_config(words),
        **ids(words, image_token_id="<image>"),
    )


def deepseek_vl_processor(words: Words, chat: str) -> Any:
    images = hf.DeepseekVLImageProcessor(size=SIZE)
    return hf.DeepseekVLProcessor(images, words, chat_template=chat, num_image_tokens=16)


def deepseek_vl_hybrid(words: Words) -> Any:
    return hf.DeepseekVLHybridConfig(
        vision_config={**SIGLIP, "image_size": 56},
        high_res_vision_config={**SAM, "model_type": "sam_vision_model"},
        text_config=text_config(words),
        **ids(words, image_token_id="<image>"),
    )


def deepseek_vl_hybrid_processor(words: Words, chat: str) -> Any:
    images = hf.DeepseekVLHybridImageProcessor(size=SIZE, high_res_size={"height": 128, "width": 128})
    return hf.DeepseekVLHybridProcessor(images, words, chat_template=chat, num_image_tokens=16)


def janus(words: Words) -> Any:
    return hf.JanusConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "mlp_ratio": 2.0,
            "projection_dim": 48,
            "num_image_tokens": 16,
        },
        vq_config={
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 48,
            "image_token_embed_dim": 48,
        },
        text_config=text_config(words),
        **ids(words, image_token_id="<image>"),
    )


def janus_processor(words: Words, chat: str) -> Any:
    return hf.JanusProcessor(hf.JanusImageProcessor(size=SIZE), words, chat_template=chat, num_image_tokens=16)


def aria(words: Words) -> Any:
    return hf.AriaConfig(
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 980,
            "patch_size": 70,
        },
        text_config=text_config(words, model_type="aria_text", moe_num_experts=4, moe_topk=2),
        projector_patch_to_query_dict={49: 4, 196: 8},
        **ids(words, image_token_id="<image>"),
    )


def aria_processor(words: Words, chat: str) -> Any:
    return hf.AriaProcessor(
        hf.AriaImageProcessor(max_image_size=490), words, chat_template=chat, size_conversion={490: 4, 980: 8}
    )


GLM = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>")


def glm_tokens(words: Words) -> dict[str, int]:
    return ids(
        words,
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )


def glm46v(words: Words) -> Any:
    return hf.Glm46VConfig(
        vision_config={**PATCHES, "model_type": "glm4v_vision", "image_size": 112, "attention_bias": True},
        text_config=text_config(
            words, model_type="glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}
        ),
        **glm_tokens(words),
    )


def glm4v_moe(words: Words) -> Any:
    return hf.Glm4vMoeConfig(
        vision_config={**PATCHES, "image_size": 112, "attention_bias": True},
        text_config=text_config(
            words,
            model_type="glm4v_moe_text",
            rope_parameters={**MROPE, "partial_rotary_factor": 1.0},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        ),
        **glm_tokens(words),
    )


def glm_ocr(words: Words) -> Any:
    return hf.GlmOcrConfig(
        vision_config={**PATCHES, "image_size": 112},
        text_config=text_config(words, model_type="glm_ocr_text", rope_parameters=MROPE),
        **glm_tokens(words),
    )


def glm46v_processor(words: Words, chat: str) -> Any:
    return hf.Glm46VProcessor(
        hf.Glm46VImageProcessor(size=EDGES), words, hf.Glm46VVideoProcessor(size=CLIP_EDGES), chat_template=chat
    )


def paddleocr_vl(words: Words) -> Any:
    return hf.PaddleOCRVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 56,
        },
        text_config=text_config(words, model_type="paddleocr_vl_text", rope_parameters=MROPE),
        **ids(
            words,
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ),
    )


def paddleocr_vl_processor(words: Words, chat: str) -> Any:
    return hf.PaddleOCRVLProcessor(hf.PaddleOCRVLImageProcessor(size=EDGES), words, chat_template=chat)


def qwen_tokens(words: Words) -> dict[str, int]:
    return ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")


def exaone4_5(words: Words) -> Any:
    return hf.Exaone4_5_Config(
        vision_config={**PATCHES, "num_key_value_heads": 1, "fullatt_block_indexes": [1], "window_size": 56},
        text_config=text_config(
            words,
            model_type="exaone4",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        **qwen_tokens(words),
    )


def exaone4_5_processor(words: Words, chat: str) -> Any:
    return hf.Exaone4_5_Processor(
        hf.Qwen2VLImageProcessor(size=EDGES), words, hf.Qwen2VLVideoProcessor(size=CLIP_EDGES), chat_template=chat
    )


def hyperclovax(words: Words) -> Any:
    return hf.HyperCLOVAXVisionV2Config(
        vision_config={
            **PATCHES,
            "model_type": "qwen2_5_vl_vision",
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config=text_config(
            words,
            model_type="hyperclovax",
            embedding_multiplier=2.0,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            logits_scaling=2.0,
        ),
        **qwen_tokens(words),
    )


def hyperclovax_processor(words: Words, chat: str) -> Any:
    return hf.HyperCLOVAXVisionV2Processor(
        hf.Qwen2VLImageProcessor(size=EDGES), words, hf.Qwen2VLVideoProcessor(size=CLIP_EDGES), chat_template=chat
    )


def video_llama_3(words: Words) -> Any:
    return hf.VideoLlama3Config(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "patch_size": 14,
        },
        text_config=text_config(words, model_type="qwen2"),
        **qwen_tokens(words),
    )


def video_llama_3_processor(words: Words, chat: str) -> Any:
    return hf.VideoLlama3Processor(
        hf.VideoLlama3ImageProcessor(size={"shortest_edge": 4 * 14 * 14, "longest_edge": 32 * 14 * 14}),
        words,
        hf.VideoLlama3VideoProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}),
        chat_template=chat,
    )


def deepseek_ocr2(words: Words) -> Any:
    return hf.DeepseekOcr2Config(
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [24, 32]},
            "encoder_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
            },
        },
        text_config={
            **text_config(words, model_type="deepseek_ocr2_text"),
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        **ids(words, image_token_id="<image>"),
    )


def deepseek_ocr2_processor(words: Words, chat: str) -> Any:
    images = hf.DeepseekOcr2ImageProcessor(size={"height": 1024, "width": 1024})
    return hf.DeepseekOcr2Processor(images, words, chat_template=chat)


def lfm2_vl(words: Words) -> Any:
    return hf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_patches": 64,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config=text_config(
            words, model_type="lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=96, conv_L_cache=3
        ),
        projector_hidden_size=64,
        **ids(words, image_token_id="<image>"),
    )


def lfm2_vl_processor(words: Words, chat: str) -> Any:
    images = hf.Lfm2VlImageProcessor(
        min_tiles=2, max_tiles=4, min_image_tokens=4, max_image_tokens=16, encoder_patch_size=14, tile_size=56
    )
    return hf.Lfm2VlProcessor(images, words, chat_template=chat)


RECURRENT = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def qwen3_5(words: Words, **more: Any) -> Any:
    kind = hf.Qwen3_5MoeConfig if more else hf.Qwen3_5Config
    return kind(
        vision_config={**PATCHES, "num_position_embeddings": 64},
        text_config={
            **text_config(words, model_type="qwen3_5_moe_text" if more else "qwen3_5_text", **RECURRENT, **more),
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        },
        **qwen_tokens(words),
        **ids(words, vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    )


def qwen3_5_moe(words: Words) -> Any:
    return qwen3_5(
        words,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


MINICPM = {
    "image_token": "<image>",
    "video_token": "<video>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def minicpmv4_6(words: Words) -> Any:
    return hf.MiniCPMV4_6Config(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 112,
            "patch_size": 14,
        },
        insert_layer_id=1,
        image_size=112,
        text_config=text_config(
            words,
            model_type="qwen3_5_text",
            **RECURRENT,
            rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        ),
        **ids(words, image_token_id="<image>", video_token_id="<video>"),
    )


def minicpmv4_6_processor(words: Words, chat: str) -> Any:
    return hf.MiniCPMV4_6Processor(
        hf.MiniCPMV4_6ImageProcessor(scale_resolution=112, max_slice_nums=4),
        hf.MiniCPMV4_6VideoProcessor(scale_resolution=112, max_slice_nums=1),
        words,
        chat_template=chat,
    )


GEMMA4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def gemma4(words: Words, **more: Any) -> Any:
    """Heads of two widths, layers that share keys and values, and an input of each layer's own."""
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings = {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "layer_types": layers,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": len(words),
        "num_kv_shared_layers": 2,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        **more,
    }
    return hf.Gemma4Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 16,
            "position_embedding_size": 64,
        },
        text_config={**text_config(words, model_type="gemma4_text"), **settings},
        audio_config=None,
        **ids(
            words,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
        ),
    )


def gemma4_moe(words: Words) -> Any:
    """Experts, keys that are values too, and fewer heads in the layers that see everything."""
    return gemma4(
        words,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    )


def gemma4_processor(words: Words, chat: str) -> Any:
    return hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(max_soft_tokens=70),
        words,
        hf.Gemma4VideoProcessor(max_soft_tokens=70),
        chat_template=chat,
    )


def qwen3_processor(words: Words, chat: str) -> Any:
    return hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(size={"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}, patch_size=16),
        words,
        hf.Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32 * 32}),
        chat_template=chat,
    )


QWEN: dict[str, Any] = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "words": qwen_tokenizer,
}
GLM_MEDIA: dict[str, Any] = {
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "video": "<|begin_of_video|><|video|><|end_of_video|>",
    "tokens": GLM,
    "named": (("image_token", "<|image|>"), ("video_token", "<|video|>")),
}
CONTEXT: dict[str, Any] = {
    "tokens": ("<img>", "</img>", "<IMG_CONTEXT>"),
    "named": (
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
    ),
}

GEMMA4_MEDIA: dict[str, Any] = {
    "image": "<|image|>",
    "video": "<|video|>",
    "tokens": (*GEMMA4.values(), "<|video|>"),
    "named": tuple(GEMMA4.items()),
}

MORE: dict[str, Family] = {
    "vipllava": Family(vipllava, llava_processor),
    "video_llava": Family(video_llava, video_llava_processor, video="<video>"),
    "llava_next_video": Family(llava_next_video, llava_next_video_processor, video="<video>"),
    "got_ocr2": Family(
        got_ocr2,
        got_ocr2_processor,
        image="<img><imgpad></img>",
        tokens=("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>"),
        without=("text",),
        in_one_list=True,
    ),
    "ovis2": Family(ovis2, ovis2_processor, tokens=(*OVIS, "<IMG_ATOM>")),
    "lighton_ocr": Family(
        lighton_ocr,
        lighton_ocr_processor,
        tokens=("<break>", "<end>"),
        named=(("image_break_token", "<break>"), ("image_end_token", "<end>")),
    ),
    "qianfan_ocr": Family(qianfan_ocr, qianfan_ocr_processor, **CONTEXT),
    "deepseek_vl": Family(deepseek_vl, deepseek_vl_processor),
    "deepseek_vl_hybrid": Family(deepseek_vl_hybrid, deepseek_vl_hybrid_processor),
    "janus": Family(
        janus,
        janus_processor,
        tokens=("<boi>", "<eoi>"),
        named=(("boi_token", "<boi>"), ("eoi_token", "<eoi>")),
    ),
    "aria": Family(aria, aria_processor),
    "glm46v": Family(glm46v, glm46v_processor, **GLM_MEDIA, without=("picture and clip",)),
    "glm4v_moe": Family(glm4v_moe, glm46v_processor, **GLM_MEDIA, without=("picture and clip",)),
    "glm_ocr": Family(glm_ocr, glm46v_processor, **GLM_MEDIA, without=("picture and clip",)),
    "paddleocr_vl": Family(
        paddleocr_vl,
        paddleocr_vl_processor,
        image=QWEN["image"],
        tokens=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        named=(("image_token", "<|image_pad|>"),),
    ),
    "exaone4_5": Family(exaone4_5, exaone4_5_processor, **QWEN),
    "hyperclovax_vision_v2": Family(hyperclovax, hyperclovax_processor, **QWEN),
    "video_llama_3": Family(video_llama_3, video_llama_3_processor, **QWEN),
    "deepseek_ocr2": Family(deepseek_ocr2, deepseek_ocr2_processor),
    "lfm2_vl": Family(
        lfm2_vl,
        lfm2_vl_processor,
        tokens=(
            "<|image_start|>",
            "<|image_end|>",
            "<|img_thumbnail|>",
            *(f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5)),
        ),
    ),
    "qwen3_5": Family(qwen3_5, qwen3_processor, **QWEN),
    "qwen3_5_moe": Family(qwen3_5_moe, qwen3_processor, **QWEN),
    "minicpmv4_6": Family(
        minicpmv4_6,
        minicpmv4_6_processor,
        video="<video>",
        tokens=tuple(token for token in MINICPM.values() if token not in ("<image>", "<video>")),
        named=tuple(MINICPM.items()),
    ),
    "gemma4": Family(gemma4, gemma4_processor, **GEMMA4_MEDIA),
    "gemma4 (experts)": Family(gemma4_moe, gemma4_processor, **GEMMA4_MEDIA, seed=1),
}
"""Architecture to how it is made."""
