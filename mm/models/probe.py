"""What transformers' class for a checkpoint offers, found by looking at the class and not at its name.

transformers' image-text-to-text models share an interface: `get_image_features` and `get_video_features` are the
encoder, `get_decoder` is the language model, and `get_rope_index` gives positions. A `WholeModel` is such a model
without weights. An encoder process loads what lies outside the decoder, a decoder process loads the decoder.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # pyright: ignore[reportUnknownVariableType]
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm.models.attention import ATTENTION
from mm.models.checkpoint import check_tensors, converted, few, without_weights
from mm.models.converted import ConvertedTensors
from mm.models.folder import BadCheckpoint, read_json, reading

PARTS = ("layers", "rotary_emb", "get_input_embeddings")
"""What a decoder has to have so that its layers can be driven one by one, beside a final norm."""


class WholeModel:
    """transformers' model for a checkpoint. Its parameters have no memory until a part is loaded.

    Args:
        folder: The checkpoint.
        config: Its configuration.

    Attributes:
        model: The model with its head.
        decoder: Its language model, without the head. It attends through the engine.

    Raises:
        BadCheckpoint: transformers has no such model, it keeps to another interface, or the checkpoint is of another
            shape.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self.folder, self.config = folder, config
        refuse_quantized(folder)
        with torch.device("meta"):  # so that sizes in config.json are checked before anything gets memory
            meta = _build(folder, config)
        self._meta_decoder = _decoder(folder, meta)
        self._meta = meta
        self.model = self._build()
        self.decoder, self._is_given = _decoder(folder, self.model), False
        self._prefix = f"{_name_of(meta, self._meta_decoder)}."
        self._head_name = _head_name(folder, meta)

    @functools.cached_property
    def _tensors(self) -> ConvertedTensors:
        return ConvertedTensors(self.folder, self._meta)

    def num_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of the weights outside the decoder, and of the decoder with its head."""
        sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in self._meta.named_parameters()}
        outside = sum(size for name, size in sizes.items() if self.is_outside(name))
        return outside, sum(sizes.values()) - outside

    def _build(self) -> PreTrainedModel:
        with without_weights():
            model = _build(self.folder, self.config)
        cast(Any, _decoder(self.folder, model)).config._attn_implementation = ATTENTION
        return model.eval()

    @property
    def base(self) -> PreTrainedModel:
        """The model without its head, which has the methods of the interface."""
        return cast(PreTrainedModel, self.model.base_model)

    def build_decoder(self) -> nn.Module:
        """The decoder without weights; after the first time, a further one."""
        if self._is_given:
            return _decoder(self.folder, self._build())
        self._is_given = True
        return self.decoder

    def decoder_tensors(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The decoder's weights by their name in it, and the head's. None where the head is not in the checkpoint.

        Raises:
            BadCheckpoint: A weight is missing, left over, or of another shape.
        """
        found = self._tensors.read(lambda name: name.startswith(self._prefix) or name == self._head_name)
        head = found.pop(self._head_name, None)
        tensors = {name.removeprefix(self._prefix): tensor for name, tensor in found.items()}
        check_tensors(self._meta_decoder, tensors, self.folder)
        return tensors, head

    def load_encoder(self, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Load all that lies outside the decoder and its head. Returns these weights by name.

        Raises:
            BadCheckpoint: A weight is missing or of another shape.
        """
        tensors = self._tensors.read(self.is_outside)
        expected = {name: tensor for name, tensor in self.model.state_dict().items() if self.is_outside(name)}
        if missing := sorted(expected.keys() - tensors.keys()):
            raise BadCheckpoint(str(self.folder), f"lacks {few(missing)}")
        if wrong := sorted(name for name, tensor in expected.items() if tensor.shape != tensors[name].shape):
            raise BadCheckpoint(str(self.folder), f"has other shapes than its config.json says: {few(wrong)}")
        placed = {
            name: converted(tensor, device, dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        self.model.load_state_dict(placed, strict=False, assign=True)
        modules: Iterator[tuple[str, nn.Module]] = cast(Any, self.model).named_modules()
        for name, module in modules:
            if not f"{name}.".startswith(self._prefix):
                for key, buffer in module._buffers.items():  # pyright: ignore[reportPrivateUsage]
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[key] = buffer.to(device)  # pyright: ignore[reportPrivateUsage]
        return placed

    def is_outside(self, name: str) -> bool:
        """Whether a tensor of the model is of neither its decoder nor its head."""
        return not name.startswith(self._prefix) and name != self._head_name

    def features(self, inputs: Mapping[str, object]) -> Callable[..., object] | None:
        """The method that makes visual tokens of a processor's outputs; None where there is none."""
        for name in ("get_image_features", "get_video_features"):
            method: Any = getattr(self.base, name, None)
            names = [] if method is None else list(inspect.signature(method).parameters)
            pixels = [name for i, name in enumerate(names) if i == 0 or name.startswith("pixel_values")]
            if any(name in inputs for name in pixels):
                return cast("Callable[..., object]", method)
        method = getattr(self.base, "get_image_features", None)
        if "pixel_values_videos" in inputs and method is not None:  # clips that are encoded as so many pictures
            return functools.partial(_as_pictures, method)
        return None

    @property
    def num_planes(self) -> int:
        """Layers after which the decoder adds planes to visual tokens (DeepStack), from the first one on."""
        if "deepstack_visual_embeds" not in inspect.signature(self.decoder.forward).parameters:
            return 0
        return len(getattr(cast(Any, self.config).vision_config, "deepstack_visual_indexes", None) or ())

    @property
    def rope_index(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Computes positions in several axes; None where positions are counted."""
        return getattr(self.base, "get_rope_index", None)

    @property
    def masks(self) -> Callable[..., object] | None:
        """Makes the masks of a prompt; None where every token attends to the earlier ones only."""
        return getattr(self.model, "create_masks_for_generate", None)


def _as_pictures(method: Callable[..., object], *, pixel_values_videos: Tensor, return_dict: bool) -> object:
    return method(pixel_values=pixel_values_videos, return_dict=return_dict)


def _name_of(model: nn.Module, part: object) -> str | None:
    """The name of a module inside another one."""
    modules: Iterator[tuple[str, nn.Module]] = cast(Any, model).named_modules()
    return next((name for name, module in modules if module is part), None)


def transformers_types() -> frozenset[str]:
    """Every model_type for which transformers has an image-text-to-text model, or for which one was registered."""
    mapping: Any = AutoModelForImageTextToText._model_mapping  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    registered: dict[type[PretrainedConfig], object] = getattr(mapping, "_extra_content", {})
    return frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | {config.model_type for config in registered}


def is_known(config: PretrainedConfig) -> bool:
    """Whether transformers has an image-text-to-text model for a configuration."""
    return type(config) in AutoModelForImageTextToText._model_mapping  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]


def names_in_pass(config: PretrainedConfig) -> frozenset[str]:
    """The names that the pass of transformers' whole model uses, of itself and of its configuration.

    Names of what something is multiplied by are there a second time, behind "* ".
    """
    if not is_known(config):
        return frozenset()
    classes: Any = AutoModelForImageTextToText._model_mapping  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    forward: Any = inspect.unwrap(classes[type(config)].forward)
    found = list(dis.get_instructions(forward))
    factors = {f"* {one.argval}" for one, after in itertools.pairwise(found) if after.argrepr == "*"}
    names = {one for one in forward.__code__.co_consts if isinstance(one, str)}
    return frozenset(forward.__code__.co_names) | names | factors


def is_converted(config: PretrainedConfig) -> bool:
    """Whether checkpoints of this decoder store something that the model joins, such as experts one by one."""
    text: Any = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    transforms = cast("list[object] | None", get_checkpoint_conversion_mapping(text.model_type)) or []
    return any(isinstance(one, WeightConverter) for one in transforms)


def accepted(function: Callable[..., object], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function names."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def refuse_quantized(folder: Path) -> None:
    """Refuse a checkpoint whose weights are quantised, before any is read.

    Raises:
        BadCheckpoint: Names the method.
    """
    config = read_json(folder, "config.json")
    parts: list[tuple[str, Any]] = [("", config), *((f"{name}.", part) for name, part in config.items())]
    for where, part in parts:
        found: Any = cast("dict[str, Any]", part).get("quantization_config") if isinstance(part, dict) else None
        if found:
            settings = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
            method = settings.get("quant_method", "a method without a name")
            raise BadCheckpoint(
                str(folder),
                f"config.json: {where}quantization_config says that the weights are quantised with {method}, which is "
                "not read here; use the checkpoint that is not quantised",
            )


def _build(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    if not is_known(config):
        raise BadCheckpoint(
            str(folder),
            f"is of model_type {config.model_type!r}, for which transformers has no image-text-to-text model",
        )
    with reading(folder, "config.json"):
        auto: Any = AutoModelForImageTextToText
        return auto.from_config(config, trust_remote_code=False)


def _decoder(folder: Path, model: PreTrainedModel) -> nn.Module:
    decoder = cast(Any, model).get_decoder()
    missing = [name for name in PARTS if not hasattr(decoder, name)]
    if final_norm(decoder) is None:
        missing.append("norm")
    if missing:
        raise BadCheckpoint(
            str(folder),
            f"is of model_type {model.config.model_type!r}, whose decoder {type(decoder).__name__} has no "
            f"{', '.join(missing)}, so its layers cannot be run one by one",
        )
    if not any(hasattr(model.base_model, name) for name in ("get_image_features", "get_video_features")):
        raise BadCheckpoint(
            str(folder), f"is of model_type {model.config.model_type!r}, which has no get_image_features"
        )
    return decoder


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm behind a decoder's last layer: the one norm beside the layers, if there is one."""
    norms = [part for part in decoder.children() if "Norm" in type(part).__name__]
    named = getattr(decoder, "norm", None)
    return named if isinstance(named, nn.Module) else norms[0] if len(norms) == 1 else None


def _head_name(folder: Path, model: PreTrainedModel) -> str:
    head: Any = cast(Any, model).get_output_embeddings()
    name = None if head is None else _name_of(model, head)
    if name is None:
        raise BadCheckpoint(str(folder), f"is of model_type {model.config.model_type!r}, which has no head")
    if getattr(head, "bias", None) is not None:
        raise BadCheckpoint(str(folder), "has a head with a bias, which this engine cannot add")
    return f"{name}.weight"
