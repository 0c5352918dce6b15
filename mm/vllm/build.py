"""An engine on vLLM from settings."""

from __future__ import annotations

import json
from typing import Any, cast

import torch

from mm.config import ModelConfig
from mm.device import GPU_SHARE, kv_cache_bytes
from mm.engine.scheduler import SchedulerConfig
from mm.errors import InvalidOption
from mm.models.family import CheckpointFamily
from mm.models.kv_cache_spec import KVCacheSpec
from mm.plugins.calls import PluginCalls
from mm.vllm.capabilities import VLLM, check_reducer, check_settings, takes_grids
from mm.vllm.core import VllmCore
from mm.vllm.engine import VllmEngine
from mm.vllm.inputs import VllmInputs

OURS = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_batch_tokens",
    "enable_prefix_caching": "prefix_caching",
    "kv_cache_memory_bytes": "kv_cache_gb",
    "gpu_memory_utilization": "kv_cache_gb",
    "enforce_eager": "cuda_graphs",
}
"""Arguments of vLLM that a setting of ours gives."""
FIXED = frozenset(
    {
        *("enable_prompt_embeds", "enable_mm_embeds", "limit_mm_per_prompt", "language_model_only", "max_model_len"),
        *("generation_config", "scheduling_policy", "structured_outputs_config", "disable_log_stats", "runner"),
        *("skip_tokenizer_init", "trust_remote_code", "stream_interval", "logprobs_mode", "logits_processors"),
        *("override_generation_config", "mm_encoder_only", "allowed_local_media_path", "max_logprobs"),
    }
)
"""Arguments on which this interface relies."""
BLOCK = 128
"""Tokens by which the last block of a sequence may be too large."""


def build_vllm_engine(config: ModelConfig, family: CheckpointFamily, dtype: torch.dtype) -> VllmEngine:
    """vLLM with the checkpoint of a family.

    Args:
        config: With its device found.
        family: Without its decoder.

    Raises:
        MmError: vLLM is not installed, or cannot do what the settings ask.
    """
    check_settings(config)
    check_reducer(config, family.num_position_rows)
    grids = takes_grids(family)
    device, _, index = config.device.partition(":")
    if index not in ("", "0"):
        what = f"was {config.device!r}; vLLM takes the first GPUs that it sees: use cuda, and CUDA_VISIBLE_DEVICES"
        raise InvalidOption("model", "device", what)
    vision: Any = getattr(family.config, "vision_config", None)
    merge = vision.spatial_merge_size if grids else None
    inputs = VllmInputs(family, PluginCalls(config.plugins), VLLM, dtype=dtype, merge=merge)
    try:
        arguments = engine_arguments(config, family, dtype)
        core = VllmCore.start(arguments, device, lambda: inputs.vocabulary.library)
    except BaseException:
        inputs.close()
        raise
    bounds = SchedulerConfig(max_num_seqs=config.max_num_seqs, max_waiting=config.max_waiting)
    return VllmEngine(family, core, inputs, config=bounds)


def engine_arguments(config: ModelConfig, family: CheckpointFamily, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`.

    Raises:
        InvalidOption: `engine_args` cannot be read, or names what a setting says.
    """
    given = _given(config)
    found: dict[str, Any] = {
        "model": str(family.folder),
        "dtype": str(dtype).removeprefix("torch."),
        "enable_prompt_embeds": True,
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": dict.fromkeys(("image", "video"), 0),  # so that towers are not loaded
        "max_model_len": family.max_context_tokens,
        "tensor_parallel_size": config.tensor_parallel,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": config.prefix_caching,
        "generation_config": "vllm",
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": "guidance"},
        "enforce_eager": not (config.compile or (config.device.startswith("cuda") and config.cuda_graphs)),
    }
    if config.max_batch_tokens is not None:
        found["max_num_batched_tokens"] = config.max_batch_tokens
    if config.kv_cache_gb is None and config.device.startswith("cuda"):
        found["gpu_memory_utilization"] = round(GPU_SHARE * config.gpu_share, 3)
    else:
        most = config.max_num_seqs * (family.max_context_tokens + BLOCK)
        spec = _kv_cache_spec(family, dtype, config.device)
        found["kv_cache_memory_bytes"] = kv_cache_bytes(spec, most, config.kv_cache_gb, config.gpu_share)
    return found | given


def _kv_cache_spec(family: CheckpointFamily, dtype: torch.dtype, device: str) -> KVCacheSpec:
    facts = family.language.arithmetic
    return KVCacheSpec(
        num_layers=facts.num_cached_layers,
        num_heads=facts.kv_shape[0],
        head_dim=facts.kv_shape[1],
        dtype=dtype,
        device=torch.device(device),
    )


def _given(config: ModelConfig) -> dict[str, Any]:
    if config.engine_args is None:
        return {}
    try:
        found: object = json.loads(config.engine_args)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        example = '{"quantization": "fp8"}'
        raise InvalidOption("model", "engine_args", f"was {config.engine_args!r}; give a JSON object such as {example}")
    given = cast("dict[str, Any]", found)
    for name in given:
        if name in OURS:
            raise InvalidOption("model", "engine_args", f"holds {name!r}, which the setting {OURS[name]} says")
        if name in FIXED:
            raise InvalidOption("model", "engine_args", f"holds {name!r}, which cannot be changed here; leave it out")
    return given
