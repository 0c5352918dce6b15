"""A short comparison at load: our pass through a decoder against transformers' own, with the same weights.

The engine drives the layers of a decoder itself, so whatever transformers does around them has to be done here too.
What is known of it is computed, see `mm.models.arithmetic`. For a model that no test of ours covers this test decides:
a prompt with a picture of random tokens, and a few tokens after it, give the same logits, or the model is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mm.data.arrays import ints
from mm.data.tokens import Prompt, VisualTokens
from mm.engine.attention.base import build_attention
from mm.engine.kv_cache.blocks import KVCache
from mm.engine.model_input import Chunk
from mm.engine.model_runner import ModelRunner
from mm.models.attention import ATTENTION
from mm.models.family import CheckpointFamily
from mm.models.folder import BadCheckpoint, reason_of
from mm.models.language import LanguageModel
from mm.models.layers import FusedLayer
from mm.models.probe import WholeModel, accepted, is_known

log = logging.getLogger(__name__)

NUM_STEPS = 3
"""Tokens that are decoded after the prompt."""

LARGEST = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
"""The largest difference of the logits, relative to their spread, that rounding explains."""

TESTED: frozenset[tuple[str, str]] = frozenset(
    {
        ("aria", "aria_text"),
        ("aya_vision", "cohere"),
        ("cohere2_vision", "cohere2"),
        ("deepseek_ocr2", "deepseek_ocr2_text"),
        ("deepseek_vl", "llama"),
        ("deepseek_vl_hybrid", "llama"),
        ("exaone4_5", "exaone4"),
        ("gemma3", "gemma3_text"),
        ("gemma4", "gemma4_text"),
        ("glm46v", "glm4v_text"),
        ("glm4v", "glm4v_text"),
        ("glm4v_moe", "glm4v_moe_text"),
        ("glm_ocr", "glm_ocr_text"),
        ("got_ocr2", "qwen2"),
        ("hyperclovax_vision_v2", "hyperclovax"),
        ("internvl", "qwen3"),
        ("janus", "llama"),
        ("lfm2_vl", "lfm2"),
        ("lighton_ocr", "qwen3"),
        ("llava", "mistral"),
        ("llava_next", "granite"),
        ("llava_next", "mistral"),
        ("llava_next_video", "llama"),
        ("llava_onevision", "qwen2"),
        ("minicpmv4_6", "qwen3_5_text"),
        ("mistral3", "mistral"),
        ("ovis2", "qwen2"),
        ("paddleocr_vl", "paddleocr_vl_text"),
        ("paligemma", "gemma"),
        ("perception_lm", "llama"),
        ("qianfan_ocr", "qwen3"),
        ("qwen3_5", "qwen3_5_text"),
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        ("qwen3_vl", "qwen3_vl_text"),
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
        ("video_llama_3", "qwen2"),
        ("video_llava", "llama"),
        ("vipllava", "llama"),
    }
)
"""Pairs of model_type and the text model's model_type that tests compare with `generate`."""


def needs_self_test(family: CheckpointFamily) -> bool:
    """Whether no test covers this architecture with this decoder, and transformers has it too."""
    if not is_known(family.config):
        return False  # of a plugin that brings a configuration of its own
    text: Any = family.config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    if (family.config.model_type, text.model_type) in TESTED:
        return False
    own = getattr(family, "model_types", frozenset[str]())
    return not (family.config.model_type in own and all(isinstance(one, FusedLayer) for one in family.language.layers))


def self_test(family: CheckpointFamily) -> None:
    """Compare the logits after a short prompt, and after a few more tokens, with those of transformers.

    Call it before weights are repacked.

    Raises:
        BadCheckpoint: They differ, with the difference, or a pass failed.
    """
    started = time.perf_counter()
    visual, messages = family.trial()
    try:
        prompt = family.splice(messages, visual)
        theirs, tokens = _their_logits(family, prompt, visual)
        ours = _our_logits(family.language, prompt, tokens)
    except Exception as error:
        raise BadCheckpoint(
            str(family.folder),
            f"is of an architecture that failed its self-test ({family.config.model_type}): {reason_of(error)}",
        ) from error
    difference = _difference(ours, theirs)
    most = LARGEST[family.language.dtype]
    what = f"model_type={family.config.model_type} difference={difference:.1e} allowed={most:.0e}"
    log.info("event=self_test %s seconds=%.1f", what, time.perf_counter() - started)
    if not difference <= most:
        raise BadCheckpoint(
            str(family.folder),
            f"is of an architecture that is not computed right here: logits of a short prompt differ from those of "
            f"transformers by {difference:.1e} of their spread, and {most:.0e} is allowed; serve another model, or "
            "start with --skip-self-test to get answers that may be wrong",
        )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two sets of logits, relative to their spread; infinite where one is not finite."""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.std())


@torch.inference_mode()
def _our_logits(language: LanguageModel, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """(1 + n, vocab): after the prompt, and after each of the n tokens."""
    shape = language.kv_cache_spec
    num_blocks = shape.num_layers * shape.num_blocks(prompt.length + len(tokens) + 1)
    cache = KVCache(shape, num_blocks=num_blocks, max_num_seqs=1)
    runner, seq_index = ModelRunner(language, build_attention(cache)), cache.allocate()
    visual = prompt.is_visual.nonzero().squeeze(1)
    chunk = Chunk(
        seq_index=seq_index,
        embeddings=prompt.embeddings,
        positions=prompt.positions,
        token_ids=prompt.token_ids,
        mask=prompt.mask,
        mask_in_windows=prompt.mask_in_windows,
        layer_planes=prompt.layer_planes,
        visual=visual,
    )
    logits = [runner.forward([chunk])]
    for i, token in enumerate(tokens):
        embeddings = language.embed(torch.tensor([token]))
        position = torch.tensor([[prompt.next_position + i]], device=embeddings.device)
        ids = torch.tensor([token])
        step = Chunk(seq_index=seq_index, embeddings=embeddings, positions=position, token_ids=ids)
        logits.append(runner.forward([step]))
    return torch.cat(logits)


@torch.inference_mode()
def _their_logits(family: CheckpointFamily, prompt: Prompt, visual: Sequence[VisualTokens]) -> tuple[Tensor, list[int]]:
    """The same of transformers' model, and the tokens that it chose. It has the decoder's weights and no others."""
    whole = getattr(family, "whole", None) or _whole(family)
    head = cast(nn.Linear, whole.model.get_output_embeddings())
    text: Any = whole.decoder.config
    held, head.weight = head.weight, nn.Parameter(family.language.head_weight, requires_grad=False)
    text._attn_implementation = "eager"  # the one that has every arithmetic
    try:
        return _run(family, whole, prompt, visual)
    finally:
        head.weight, text._attn_implementation = held, ATTENTION


def _whole(family: CheckpointFamily) -> WholeModel:
    whole = WholeModel(family.folder, family.config)
    decoder = cast(nn.Module, family.language.model)
    whole.decoder.load_state_dict(decoder.state_dict(), assign=True)
    return whole


def _run(
    family: CheckpointFamily, whole: WholeModel, prompt: Prompt, visual: Sequence[VisualTokens]
) -> tuple[Tensor, list[int]]:
    device, ids = family.language.device, prompt.token_ids.unsqueeze(0)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    inputs |= {name: types.unsqueeze(0).to(device) for name, types in family.type_ids(ints(prompt.token_ids)).items()}
    for tokens in visual:
        inputs |= {name: value.to(device) for name, value in tokens.layout.items()}
    output = _with_features(whole, accepted(whole.model.forward, inputs), visual, prompt)
    logits, tokens = [output.logits[0, -1:]], list[int]()
    for _ in range(NUM_STEPS):
        tokens.append(int(logits[-1].argmax()))
        step = torch.tensor([[tokens[-1]]], device=device)
        output = cast(Any, whole.model)(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1:])
    return torch.cat(logits), tokens


def _with_features(whole: WholeModel, options: dict[str, Any], visual: Sequence[VisualTokens], prompt: Prompt) -> Any:
    """The model's pass with visual tokens in place of pixels, in whichever of two forms it takes them."""
    model, device = cast(Any, whole.model), prompt.token_ids.device
    if not visual:
        return model(**options)
    (tokens,) = visual
    rows, planes = tokens.embeddings.to(device), tokens.layer_planes
    named: Sequence[int] = getattr(whole.config, "visual_indicator_token_ids", ())
    ids, of_named = prompt.token_ids[prompt.is_visual], torch.zeros(len(named), rows.shape[1]).to(rows)
    for i, one in enumerate(named):
        if len(found := rows[ids == one]):
            of_named[i] = found[0]
    rows = rows[~torch.isin(ids, torch.tensor(named, dtype=torch.int64, device=device))]
    deepstack = [] if planes is None else [(plane.to(device),) for plane in planes]
    forms: list[Any] = [[rows], rows.unsqueeze(0)]
    errors: list[Exception] = []
    for form in forms:
        features = BaseModelOutputWithPooling(pooler_output=form)
        features.deepstack_features = deepstack  # pyright: ignore[reportAttributeAccessIssue]
        features.visual_indicator_features = of_named  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return model(**options, mm_encoder_outputs={"image": features})
        except (TypeError, AttributeError, RuntimeError) as error:
            errors.append(error)
    raise errors[0]
