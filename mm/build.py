"""The one composition root: a configuration becomes an encoder and an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mm.config import ModelConfig
from mm.data.media import FrameSampling
from mm.device import check_device, has_bfloat16, kv_cache_bytes, resolved
from mm.encode.feature_cache import FeatureCache
from mm.encode.named import build_encoder
from mm.encode.parts import EncodeParts
from mm.encode.token_budget import check_budget_by
from mm.engine.engine import LLMEngine
from mm.engine.interface import DecoderEngine
from mm.engine.scheduler import SchedulerConfig
from mm.engine.self_test import needs_self_test, self_test
from mm.engine.tensor_parallel.gang import Gang, devices
from mm.errors import BrokenPlugin, InvalidOption, MmError
from mm.media import DecodeMemory
from mm.models.checkpoint import BadCheckpoint, check_depths, find, read_config
from mm.models.family import CheckpointFamily
from mm.models.folder import reading
from mm.models.locate import read_template
from mm.models.pretrained import model_config as read_model_config
from mm.models.probe import refuse_quantized, transformers_types
from mm.models.quantized import is_available
from mm.models.tensor_parallel import split
from mm.plugins.calls import PluginCalls
from mm.plugins.capabilities import check_compatible
from mm.plugins.registry import create, get, names
from mm.plugins.spec import bind, configured_reducer
from mm.plugins.threads import is_interrupt


def _dtype(config: ModelConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if has_bfloat16(config.device) else torch.float32
    return getattr(torch, config.dtype)


def _plugin_for(
    kind: Literal["encoder", "family"],
    config: ModelConfig,
    change: Callable[[type[Any]], type[Any]] | None = None,
    **options: Any,
) -> Any:
    """The encoder or family that handles the checkpoint's model_type.

    Args:
        change: Makes another class of the plugin's.
    """
    check_device(config.device)
    folder = find(config.model)
    name = plugin_name(kind, folder)
    refuse_quantized(folder)  # before anything else is found to be missing
    try:
        with reading(folder, f"config.json, or another file that the {kind} {name!r} reads,"):
            given: dict[str, Any] = {"folder": folder, "device": config.device, "dtype": _dtype(config), **options}
            return create(kind, name, **given) if change is None else change(get(kind, name))(**given)
    except BaseException as error:
        if isinstance(error, MmError) or is_interrupt(error):
            raise
        raise BrokenPlugin(kind, name, f"building it raised {type(error).__name__}") from error


GENERIC = "transformers"
"""The encoder and the family for checkpoints that no other one takes."""


def plugin_name(kind: Literal["encoder", "family"], folder: Path) -> str:
    """The encoder or family that handles a checkpoint: that of its model_type, or else the generic one.

    An encoder or family may have a static method `takes` that says of a config.json whether it can handle it.
    """
    raw = read_config(folder)
    name = str(raw["model_type"])
    if name not in names(kind):
        if name not in transformers_types():
            known = ", ".join(names("family"))
            raise BadCheckpoint(
                str(folder),
                f"is of model_type {name!r}, for which no {kind} is installed (families: {known}), and for which "
                "transformers has no image-text-to-text model",
            )
        return GENERIC
    takes: Callable[[dict[str, Any]], bool] | None = getattr(get(kind, name), "takes", None)
    return name if takes is None or takes(raw) else GENERIC


def build_encode_parts(config: ModelConfig, encoder_text: str | None = None) -> EncodeParts:
    """The encoder's half of a model: only tower and projector are read.

    Args:
        encoder_text: An encoder by name, such as "timm:model_name=vit_tiny_patch16_224", in place of the model's own.

    Raises:
        MmError: The model cannot be found or used, or the default reducer cannot work with it.
    """
    config = _on_this_process(config)
    model = find(config.model) if encoder_text is None else None
    if encoder_text is None:
        encoder, host = _plugin_for("encoder", config), config.model
    else:
        check_device(config.device)
        encoder, host = build_encoder(encoder_text, config.device, _dtype(config)), encoder_text
    reducer = configured_reducer(config)
    check_compatible(bind(reducer, model, config.device).plugin, encoder, host)
    check_budget_by(config.reducers, encoder, host)
    return EncodeParts(
        encoder=encoder,
        cache=FeatureCache(config.cache_bytes),
        host=host,
        model=model,
        device=config.device,
        reducer=reducer.canonical,
        frames=FrameSampling(num_frames=config.num_frames, fps=config.fps),
        limits=config.limits,
        memory=DecodeMemory(config.limits.max_decoded_bytes),
        sources=config.sources,
        policy=config.reducers,
        calls=PluginCalls(config.plugins),
    )


def build_decoder(config: ModelConfig) -> DecoderEngine:
    """The decoder's half of a model, on the engine that the settings name.

    Raises:
        MmError: The engine is not installed, or cannot do what the settings ask.
    """
    if config.engine == "native":
        return build_engine(config)
    from mm.vllm.build import build_vllm_engine
    from mm.vllm.decoder_facts import without_decoder

    config = _on_this_process(config)
    return build_vllm_engine(config, _family(config, change=without_decoder), _dtype(config))


def _family(config: ModelConfig, **options: Any) -> CheckpointFamily:
    template = read_template(config.chat_template)
    if template is not None:
        options["chat_template"] = template
    family: CheckpointFamily = _plugin_for("family", config, **options)
    family.text_after_clip = config.text_after_clip
    return family


def build_engine(config: ModelConfig) -> LLMEngine:
    """The decoder's half of a model on the native engine: only the language weights are read.

    Raises:
        InvalidOption: A setting belongs to another engine.
    """
    if config.engine_args is not None:
        raise InvalidOption("model", "engine_args", "belongs to vLLM; leave it out, or take the engine vllm")
    config = _on_this_process(config)
    _check_quantization(config)
    gang = None
    if config.tensor_parallel > 1:
        check_tensor_parallel(config)
        gang = Gang(config.tensor_parallel, config.device, config.num_threads)
    try:
        return _built_engine(config, gang)
    except BaseException:
        if gang is not None:
            gang.close()
        raise


def _built_engine(config: ModelConfig, gang: Gang | None) -> LLMEngine:
    family = _family(config) if gang is None else _family(config, load=gang.load)
    if gang is None and needs_self_test(family) and not config.skip_self_test:
        self_test(family)
    on_cpu = not config.device.startswith("cuda")
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_batch_tokens or (512 if on_cpu else 4096),
        max_waiting=config.max_waiting,
    )
    most = config.max_num_seqs * family.max_context_tokens
    kv_bytes = kv_cache_bytes(family.language.kv_cache_spec, most, config.kv_cache_gb, config.gpu_share)
    if config.quantize == "int8":
        family.language.quantize()
    elif config.compile:
        family.language.compile()
    else:
        family.language.prepack()
    return LLMEngine(
        family,
        config=scheduler_config,
        kv_bytes=kv_bytes,
        prefix_caching=config.prefix_caching,
        speculation=config.speculation,
        cuda_graphs=config.cuda_graphs,
        on_error=config.reducers.on_error,
        plugins=config.plugins,
        gang=gang,
    )


def check_tensor_parallel(config: ModelConfig) -> None:
    """Refuse a decoder that cannot be split, before any process is started.

    Raises:
        InvalidOption: Says what cannot be split, and into how many parts it could be.
    """
    size, folder = config.tensor_parallel, find(config.model)
    for option, is_on in (("quantize", config.quantize != "none"), ("compile", config.compile)):
        if is_on:
            raise InvalidOption("model", option, "cannot be used with tensor_parallel; leave out one of them")
    check_device(config.device)
    refuse_quantized(folder)
    check_depths(folder)
    name = plugin_name("family", folder)
    if getattr(get("family", name), "load_language", None) is not CheckpointFamily.load_language:
        what = f"was {size}, but the family {name!r} loads its decoder in its own way; leave the option out"
        raise InvalidOption("model", "tensor_parallel", what)
    devices(size, resolved(config.device))
    split(folder, read_model_config(folder), 0, size)


def _check_quantization(config: ModelConfig) -> None:
    if config.quantize == "none":
        return
    if not config.device.startswith("cpu"):
        what = f"was {config.quantize!r}, which works on a CPU only; on {config.device} serve a smaller dtype"
        raise InvalidOption("model", "quantize", what)
    if config.compile:
        raise InvalidOption("model", "compile", "cannot be used with quantize; leave out one of them")
    if not is_available():
        what = "was 'int8', for which this build of torch has no products (oneDNN); leave it out"
        raise InvalidOption("model", "quantize", what)


def _on_this_process(config: ModelConfig) -> ModelConfig:
    """The configuration with its device found. Also sets torch's threads; members of a gang share them."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.tensor_parallel > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.tensor_parallel))
    return replace(config, device=resolved(config.device))
