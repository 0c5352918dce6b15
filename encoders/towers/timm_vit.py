"""Any ViT of timm as a tower: patch tokens, without prefix tokens and without a projector.

The width is the tower's own: for studies of reducers and for models that bring their own projector. Pictures go through
the model's own data configuration. The one file that needs timm, and only when an encoder is built.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PilImage
from torch import Tensor

from encoders.batches import in_batches
from encoders.fingerprint import fingerprint
from mm.core.data import Grid, Image, Video, VisualTokens
from mm.core.errors import InvalidOption, PluginError, nearest

MAX_BATCH = 16


class TimmEncoder:
    """Patch tokens of a timm ViT: one image is one grid, a clip is the grids of its frames.

    Args:
        model_name: As `timm.list_models()` writes it.
        pretrained: Download timm's weights; otherwise they come from `checkpoint`, or are random.
        checkpoint: File of weights.
        device, dtype: Where and in what the tower computes.
        image_size: Side in pixels, where the model can be built for another than its own.

    Raises:
        InvalidOption: timm has no such model, or it is no ViT.
        PluginError: timm is not installed.
    """

    provides: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset({"image", "video"})

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | None = None,
    ) -> None:
        data = _timm().data
        self.device, self.dtype = torch.device(device), dtype
        self.model = _build(model_name, pretrained, checkpoint, image_size).to(self.device, dtype).eval()
        self.grid: Grid = (1, *self.model.patch_embed.grid_size)
        side = {"input_size": (3, *self.model.patch_embed.img_size)}
        self.data_config: dict[str, Any] = data.resolve_data_config(side, model=self.model)
        self._transform: Any = data.create_transform(**self.data_config, is_training=False)
        settings = json.dumps(self.data_config, sort_keys=True, default=str)
        weights = self.model.state_dict().items()
        self.fingerprint: str = fingerprint("timm", model_name, settings, str(dtype), tensors=weights)

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order; all pictures and frames of a call share batches.

        Raises:
            CapacityError: The device has no memory for one picture.
        """
        counts = [1 if isinstance(item, Image) else len(item.frames) for item in items]
        pictures = [p for item in items for p in ([item.pixels] if isinstance(item, Image) else item.frames)]
        if not pictures:
            return []
        patches = in_batches(self._forward, self.preprocess(pictures), MAX_BATCH)["embeddings"].split(counts)
        _, height, width = self.grid
        return [
            VisualTokens.full(tokens.flatten(0, 1), (count, height, width), item.kind)
            for item, count, tokens in zip(items, counts, patches, strict=True)
        ]

    def preprocess(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB (H, W, 3) pictures to (B, 3, h, w), by timm's own evaluation transform."""
        return torch.stack([self._transform(PilImage.fromarray(picture)) for picture in pictures])

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.model.forward_features(pixels.to(self.device, self.dtype))
        return {"embeddings": features[:, self.model.num_prefix_tokens :]}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise PluginError("towers of timm need it installed: pip install 'mm-serving[timm]'") from error
    return timm


def _build(model_name: str, pretrained: bool, checkpoint: str | Path | None, image_size: int | None) -> Any:
    timm = _timm()
    if not timm.is_model(model_name):
        close = nearest(model_name, timm.list_models())
        raise InvalidOption("timm", "model_name", f"was {model_name!r}, which timm does not have{close}")
    size = {} if image_size is None else {"img_size": image_size}
    # "" is how timm spells "no checkpoint".
    path = str(checkpoint) if checkpoint is not None else ""
    try:
        model = timm.create_model(model_name, pretrained=pretrained, checkpoint_path=path, num_classes=0, **size)
    except TypeError as error:
        raise InvalidOption(
            "timm", "image_size", f"was {image_size}, but {model_name} cannot be built for it"
        ) from error
    patches = getattr(model, "patch_embed", None)
    if not (hasattr(model, "num_prefix_tokens") and getattr(patches, "grid_size", None)):
        raise InvalidOption(
            "timm", "model_name", f"was {model_name!r}, which is no ViT: it has no grid of patch tokens"
        )
    return model
