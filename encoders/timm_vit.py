"""Any ViT of timm as an encoder: its patch tokens, without prefix tokens such as [CLS] and without a projector.

Use it for image embeddings (`mm embed`) and for studies of reducers. The width of the tokens is the tower's. Pictures
go through the evaluation transform that timm has for the model. timm is imported when an encoder is built.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage
from torch import Tensor, nn

from encoders.helpers.batches import in_batches
from encoders.helpers.fingerprint import fingerprint
from encoders.helpers.merging import merged_tokens, run_blocks
from encoders.helpers.pictures import Pictures
from mm.data.media import Image, Video
from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption, PluginError, nearest
from mm.plugins.features import BLOCK_KEYS, TOWER_FEATURES
from mm.plugins.reducer import InTower

MAX_BATCH = 16

SAFE = ".safetensors"
"""The one format of weights that is read: a pickle could run code."""


class TimmEncoder:
    """Patch tokens of a timm ViT. An image is one grid of tokens, and a clip is one grid per frame.

    Reducers inside the tower are supported if the blocks are timm's standard ones.

    Args:
        model_name: A name from `timm.list_models()`.
        pretrained: Download timm's weights.
        checkpoint: File of weights. With neither this nor `pretrained` the weights are random, and
            `has_random_weights` is true; that is of use for tests only.
        device, dtype: Where and in what the tower computes.
        image_size: Side in pixels. By default the model's own.

    Raises:
        InvalidOption: timm has no such model, or it is no ViT.
        PluginError: timm is not installed.
    """

    provides: frozenset[str] = frozenset({TOWER_FEATURES, BLOCK_KEYS})
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
        self.has_random_weights: bool = not pretrained and checkpoint is None
        self.model = _build(model_name, pretrained, checkpoint, image_size).to(self.device, dtype).eval()
        self.provides = frozenset({TOWER_FEATURES, BLOCK_KEYS} if _is_plain(self.model) else {TOWER_FEATURES})
        self.grid: Grid = (1, *self.model.patch_embed.grid_size)
        side = {"input_size": (3, *self.model.patch_embed.img_size)}
        self.data_config: dict[str, Any] = data.resolve_data_config(side, model=self.model)
        self._transform: Any = data.create_transform(**self.data_config, is_training=False)
        settings = json.dumps(self.data_config, sort_keys=True, default=str)
        weights = self.model.state_dict().items()
        self.fingerprint: str = fingerprint("timm", model_name, settings, str(dtype), tensors=weights)

    def encode(
        self,
        items: Sequence[Image | Video | Pictures],
        needs: frozenset[str] = frozenset(),
        merging: InTower | None = None,
    ) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order. All pictures and frames of a call share batches.

        Args:
            needs: Auxiliary features to compute.
            merging: A reducer that merges tokens inside the tower, in each frame by itself.

        Raises:
            CapacityError: The device has no memory for one picture.
        """
        if not items:
            return []
        prepared = [item if isinstance(item, Pictures) else self.prepare(item) for item in items]
        counts = [len(item.pixels) for item in prepared]
        forward = self._forward if merging is None else lambda pixels: self._forward_merging(pixels, merging)
        outputs = in_batches(forward, torch.cat([item.pixels for item in prepared]), MAX_BATCH)
        split = [
            dict(zip(outputs, planes, strict=True))
            for planes in zip(*(plane.split(counts) for plane in outputs.values()), strict=True)
        ]
        return [self._tokens(item, found, needs) for item, found in zip(prepared, split, strict=True)]

    def _tokens(self, item: Pictures, found: dict[str, Tensor], needs: frozenset[str]) -> VisualTokens:
        embeddings, (_, height, width) = found["embeddings"], self.grid
        grid = (len(embeddings), height, width)
        if "anchors" in found:
            merged = list(zip(found["anchors"], found["sizes"], strict=True))
            return merged_tokens(list(embeddings), merged, grid, item.kind, embeddings.flatten(0, 1), needs)
        tokens = embeddings.flatten(0, 1)
        aux_features = {TOWER_FEATURES: tokens.float().mT} if TOWER_FEATURES in needs else {}
        return VisualTokens.full(tokens, grid, item.kind, aux_features)

    def prepare(self, item: Image | Video) -> Pictures:
        """The picture or frames by timm's own evaluation transform."""
        pictures = [item.pixels] if isinstance(item, Image) else item.frames
        pixels = torch.stack([self._transform(PilImage.fromarray(picture)) for picture in pictures])
        return Pictures(kind=item.kind, pixels=pixels)

    def grid_of(self, prepared: Pictures) -> Grid:
        """The grid of the item's tokens."""
        return (len(prepared.pixels), *self.grid[1:])

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.model.forward_features(pixels.to(self.device, self.dtype))
        return {"embeddings": features[:, self.model.num_prefix_tokens :]}

    @torch.inference_mode()
    def _forward_merging(self, pixels: Tensor, merging: InTower) -> dict[str, Tensor]:
        """`embeddings` (B, m, D), `anchors` and `sizes` (B, m) of what is left."""
        model = self.model
        hidden = model.norm_pre(
            model.patch_drop(model._pos_embed(model.patch_embed(pixels.to(self.device, self.dtype))))
        )
        merged = run_blocks(model.blocks, hidden, model.num_prefix_tokens, merging, _attend, _feed_forward)
        return {"embeddings": model.norm(merged.hidden), "anchors": merged.anchors, "sizes": merged.sizes}


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
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    # "" is how timm spells "no checkpoint".
    path = str(checkpoint) if checkpoint is not None else ""
    if path and not path.endswith(SAFE):
        raise InvalidOption("timm", "checkpoint", f"was {path!r}; only {SAFE} files are read (convert the others)")
    if pretrained:  # timm would take a pickle where a repository has no other file
        named = getattr(timm.get_pretrained_cfg(model_name), "hf_hub_filename", None)
        file = Path(named or "model.bin").with_suffix(SAFE)
        size["pretrained_cfg_overlay"] = {"url": "", "hf_hub_filename": str(file)}
    try:
        model = timm.create_model(model_name, pretrained=pretrained, checkpoint_path=path, num_classes=0, **size)
    except TypeError as error:
        raise InvalidOption(
            "timm", "image_size", f"was {image_size}, but {model_name} cannot be built for it"
        ) from error
    except Exception as error:  # of the hub's client, of torch and of safetensors, each with a tree of its own
        if path:
            reason = f"was {path!r}, which does not hold the weights of {model_name}: {type(error).__name__}"
            raise InvalidOption("timm", "checkpoint", reason) from error
        if pretrained:
            reason = f"cannot be had for {model_name}: {type(error).__name__}; download them and give checkpoint=FILE"
            raise InvalidOption("timm", "pretrained", reason) from error
        raise
    patches = getattr(model, "patch_embed", None)
    if not (hasattr(model, "num_prefix_tokens") and getattr(patches, "grid_size", None)):
        raise InvalidOption(
            "timm", "model_name", f"was {model_name!r}, which is no ViT: it has no grid of patch tokens"
        )
    return model


def _is_plain(model: Any) -> bool:
    """Whether all blocks are timm's own `Block` with its own `Attention`, so that `_attend` is what they compute."""
    import timm.layers.attention as attention
    import timm.models.vision_transformer as vit

    return isinstance(model, vit.VisionTransformer) and all(
        type(block) is vit.Block
        and type(block.attn) is attention.Attention
        and getattr(block.attn, "gate", None) is None
        for block in model.blocks
    )


def _attend(block: Any, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block up to its MLP; see `encoders.helpers.merging.Attend`."""
    attention = block.attn
    heads = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = heads.unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    mixed = attention.proj(attention.norm(mixed.transpose(1, 2).flatten(2)))
    return hidden + block.ls1(mixed), keys


def _feed_forward(block: Any, hidden: Tensor) -> Tensor:
    return hidden + block.ls2(block.mlp(block.norm2(hidden)))
