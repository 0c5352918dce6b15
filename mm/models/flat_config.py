"""Configurations that name the settings of their text model beside those of the whole model.

Older checkpoints have no `text_config`. Some classes of transformers move such settings into it, others lose them and
take defaults: another context length, other rotary embeddings.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import AutoConfig, PretrainedConfig


def with_text_settings(config: PretrainedConfig, raw: dict[str, Any]) -> PretrainedConfig:
    """The configuration with all settings of config.json.

    Args:
        config: What transformers made of it.
        raw: The file's content.
    """
    text = config.get_text_config()  # pyright: ignore[reportUnknownMemberType]
    if "text_config" in raw or text is config:
        return config
    known = cast("dict[str, object]", text.to_dict())
    lost = [name for name, value in raw.items() if name in known and name not in SHARED and known[name] != value]
    if not lost:
        return config
    parts = {*cast(Any, config).sub_configs, *SHARED}
    settings = {name: value for name, value in raw.items() if name not in parts}
    whole = {name: value for name, value in raw.items() if name != "model_type"}
    return AutoConfig.for_model(raw["model_type"], **whole, text_config=settings)  # pyright: ignore[reportUnknownMemberType]


SHARED = frozenset({"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache"})
"""Settings of the whole model that its text model has too, with a value of its own."""
