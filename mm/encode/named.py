"""Encoders that are built by name, without a checkpoint's config.json that chooses one."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from mm.errors import InvalidOption, nearest
from mm.plugins.encoder import Encoder
from mm.plugins.registry import create, get
from mm.plugins.spec import parse_spec

GIVEN = frozenset({"device", "dtype"})
"""Arguments that come from the configuration and not from the text."""


def build_encoder(text: str, device: str, dtype: torch.dtype) -> Encoder:
    """The encoder that a text such as "timm:model_name=vit_tiny_patch16_224" describes.

    Args:
        text: A registered name with options, as for reducers.
        device, dtype: Where and in what the tower computes.

    Raises:
        UnknownPlugin: No encoder of that name is registered.
        InvalidOption: The text names several encoders or an option that this one does not have, or lacks one.
    """
    parts = parse_spec(text)
    if len(parts) != 1:
        raise InvalidOption("encoder", text, "names several encoders; one encodes everything")
    name, options = parts[0]
    parameters = inspect.signature(get("encoder", name)).parameters
    known = [parameter for parameter in parameters if parameter not in GIVEN]
    for option in options:
        if option not in known:
            allowed = ", ".join(known) or "none"
            raise InvalidOption(name, option, f"does not exist{nearest(option, known)} (options: {allowed})")
    for option in known:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise InvalidOption(name, option, f"is missing; write {name}:{option}=...")
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    return create("encoder", name, **options, **{key: placed[key] for key in parameters if key in placed})
