"""LLaVA: the vision tower and the projector of a LLaVA checkpoint.

The tower is the class that transformers has for the checkpoint's `vision_config`. The projector is transformers' own,
and pictures go through the checkpoint's image processor. In float32 the tokens are bit-equal to
`LlavaForConditionalGeneration.get_image_features` for the same batch.

Clips are supported if config.json has `video_token_id` and `frame_pool_size`. Each frame goes through tower and
projector like an image, then neighbouring tokens are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoders.checkpoint_encoder import CheckpointEncoder
from encoders.helpers.auxiliary_features import observed_in_block
from encoders.helpers.batches import in_batches
from encoders.helpers.cells import encode_dropping, picture_cells, tokens_of_cells, value_ranges
from encoders.helpers.hidden_states import wanted_states
from encoders.helpers.loading import Rename
from encoders.helpers.merging import merged_tokens, run_blocks
from encoders.helpers.pictures import Pictures, join_frames
from mm.data.media import Image, Kind, Video
from mm.data.tokens import Grid, VisualTokens
from mm.errors import MediaError
from mm.models.families.llava import Llava
from mm.models.pretrained import build_module
from mm.plugins.capabilities import check_kinds
from mm.plugins.features import (
    ATTENTION_RECEIVED,
    BLOCK_KEYS,
    CLIP_EMBEDDINGS,
    CLIP_TEXT,
    CLS_ATTENTION,
    PATCHES,
    TEXT_EMBEDDINGS,
    TOWER_FEATURES,
    TOWER_KEYS,
)
from mm.plugins.reducer import BeforeTower, InTower

MAX_BATCH = 16
"""Pictures per forward. Up to this number, the images of one call are one batch, as in `generate` of transformers."""

SEQUENTIAL_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})
"""Towers whose hidden state l is the output of block l. Blocks above the deepest feature layer need not be loaded."""

TOWER_KEY = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)$")
PROJECTOR_KEY = re.compile(r"^(?:model\.)?multi_modal_projector\.(.+)$")


class LlavaEncoder(CheckpointEncoder):
    """Images, and clips if the checkpoint supports them, to the visual tokens that its decoder was trained on.

    Auxiliary features are computed on request. They come from the block that the embeddings come from, or from the
    deepest of several. The softmax of attention is over all keys, [CLS] included. For clips, auxiliary features are
    averaged over the pooled cells.

    `provides` and `kinds` of the class are what a checkpoint may have. Those of an instance are what its checkpoint
    has.

    Args:
        folder: A LLaVA checkpoint: a local folder, a shipped model's name or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder is no LLaVA checkpoint, or lacks weights.
    """

    checkpoint_types = ("llava",)
    provides: frozenset[str] = frozenset(
        {CLS_ATTENTION, ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS, BLOCK_KEYS, PATCHES}
        | {CLIP_EMBEDDINGS, CLIP_TEXT}
    )
    kinds: frozenset[str] = frozenset({"image", "video"})
    frames_apart: ClassVar[bool] = True
    merges: ClassVar[frozenset[str]] = frozenset({"image"})  # the frames of a clip are pooled, on their whole grid
    takes = staticmethod(Llava.takes)

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(folder, device, dtype)
        self._layers = _feature_layers(self.config)
        self.tower: Any = self.load(lambda: build_module(self.path, self.config.vision_config), TOWER_KEY, _renamer)
        self.projector = self.load(lambda: LlavaMultiModalProjector(self.config), PROJECTOR_KEY, _renamer)
        self.finish({"tower": self.tower, "projector": self.projector})
        self._pool: int = getattr(self.config, "frame_pool_size", None) or 0
        takes_clips = self._pool > 0 and getattr(self.config, "video_token_id", None) is not None
        self.kinds = frozenset({"image", "video"} if takes_clips else {"image"})
        self._has_cls = _has_cls(self.tower)
        self.provides = self._provided()

    def _provided(self) -> frozenset[str]:
        found = {TOWER_FEATURES, TEXT_EMBEDDINGS}
        if self.has_clip and len(self._layers) == 1:
            found |= {CLIP_EMBEDDINGS, CLIP_TEXT}
        if self.config.vision_config.model_type in SEQUENTIAL_TOWERS and max(self._layers) > 0:
            found |= {ATTENTION_RECEIVED, TOWER_KEYS} | ({CLS_ATTENTION} if self._has_cls else set())
            if self._has_cls == (self._first_token() == 1):
                found |= {PATCHES} | ({BLOCK_KEYS} if len(self._layers) == 1 else set())
        return frozenset(found)

    def _first_token(self) -> int:
        """Index of the first token of the tower that goes to the projector."""
        return 1 if self.config.vision_feature_select_strategy == "default" else 0

    def encode(
        self,
        items: Sequence[Image | Video | Pictures],
        needs: frozenset[str] = frozenset(),
        merging: InTower | None = None,
        dropping: BeforeTower | None = None,
    ) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order.

        The images are one batch (up to `MAX_BATCH`). The frames of each clip are another.

        Args:
            needs: Auxiliary features to compute.
            merging: A reducer that merges tokens inside the tower.
            dropping: A reducer whose cells never enter the tower. Items that lose none are computed as without it.

        Raises:
            MediaError: A clip for a checkpoint without clips.
            IncompatiblePlugin: A clip with `merging`; see `merges`.
            CapacityError: The device has no memory for one picture.
        """
        prepared = [item if isinstance(item, Pictures) else self.prepare(item) for item in items]
        if merging is not None:
            return self._encode_merging(prepared, needs, merging)
        if dropping is not None:
            return self._encode_dropping(prepared, needs, dropping)
        images = iter(self._encode_pictures([item.pixels for item in prepared if item.kind == "image"], "image", needs))
        return [next(images) if item.kind == "image" else self._encode_clip(item.pixels, needs) for item in prepared]

    def prepare(self, item: Image | Video) -> Pictures:
        """The picture, or the frames of the clip, as the tower's input."""
        if item.kind not in self.kinds:
            raise MediaError("not_supported", item.kind)
        pictures = [item.pixels] if isinstance(item, Image) else list(item.frames)
        return Pictures(kind=item.kind, pixels=self.preprocess(pictures))

    def grid_of(self, prepared: Pictures) -> Grid:
        """The grid of the item's tokens."""
        height, width = (size // self.config.vision_config.patch_size for size in prepared.pixels.shape[2:])
        side = self._cell_side(prepared)
        found = (len(prepared.pixels), -(-height // side), -(-width // side))
        # Without a grid, see `_grid`: all patches, and [CLS] where it is left among them.
        surplus = int(self._has_cls) - self._first_token()
        return found if not surplus else (1, 1, height * width + surplus)

    def _encode_pictures(self, pictures: Sequence[Tensor], kind: Kind, needs: frozenset[str]) -> list[VisualTokens]:
        if not pictures:
            return []
        pixels = torch.cat(list(pictures))
        outputs = in_batches(lambda batch: self._forward(batch, needs), pixels, MAX_BATCH)
        grid = self._grid(pixels, outputs["embeddings"].shape[1])
        aux_features = [
            {name: plane[i] for name, plane in outputs.items() if name != "embeddings"} for i in range(len(pixels))
        ]
        return [
            VisualTokens.full(embeddings, grid, kind, found)
            for embeddings, found in zip(outputs["embeddings"], aux_features, strict=True)
        ]

    def _encode_merging(self, items: Sequence[Pictures], needs: frozenset[str], merging: InTower) -> list[VisualTokens]:
        pictures = [item.pixels for item in items]
        check_kinds(merging, (item.kind for item in items), self.merges)
        if not pictures:
            return []
        pixels = torch.cat(pictures)
        outputs = in_batches(lambda batch: self._forward_merging(batch, merging), pixels, MAX_BATCH)
        patch = self.config.vision_config.patch_size
        grid = (1, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        return [
            merged_tokens([row["embeddings"]], [(row["anchors"], row["sizes"])], grid, "image", row["features"], needs)
            for row in ({name: plane[i] for name, plane in outputs.items()} for i in range(len(pictures)))
        ]

    def _encode_dropping(
        self, items: Sequence[Pictures], needs: frozenset[str], dropping: BeforeTower
    ) -> list[VisualTokens]:
        return encode_dropping(
            items,
            dropping,
            self._cells,
            lambda whole: self.encode(whole, needs),
            lambda item, keep: self._encode_kept(item, keep, needs),
        )

    def _cell_side(self, item: Pictures) -> int:
        """Patches along one side of a cell."""
        return self._pool if item.kind == "video" else 1

    def _cells(self, item: Pictures) -> Tensor:
        side = self._cell_side(item) * self.config.vision_config.patch_size
        return picture_cells(item.pixels, side, value_ranges(self.image_processor, item.pixels.shape[1]))

    def _encode_kept(self, item: Pictures, keep: Tensor, needs: frozenset[str]) -> VisualTokens:
        """One picture after the other: each has another number of patches."""
        side, patch = self._cell_side(item), self.config.vision_config.patch_size
        height, width = (size // patch for size in item.pixels.shape[2:])
        cells = keep.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)[:, :height, :width]
        places = torch.arange(keep[0].numel()).view(keep.shape[1:])
        places = places.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)[:height, :width]
        parts = dict[str, list[Tensor]]()
        for picture, stays in zip(item.pixels, cells, strict=True):
            for name, rows in (self._forward_kept(picture, stays) if bool(stays.any()) else {}).items():
                _, cell, counts = places[stays].unique(return_inverse=True, return_counts=True)
                sums = torch.zeros(len(counts), rows.shape[1], device=rows.device)
                means = sums.index_add_(0, cell.to(rows.device), rows.float()) / counts.to(rows.device).unsqueeze(1)
                parts.setdefault(name, []).append(means.to(rows.dtype))
        found = {name: torch.cat(rows) for name, rows in parts.items()}
        aux_features = {TOWER_FEATURES: found["features"].float().mT} if TOWER_FEATURES in needs else {}
        return tokens_of_cells(found["embeddings"], keep.to(self.device), item.kind, aux_features)

    @torch.inference_mode()
    def _forward_kept(self, picture: Tensor, stays: Tensor) -> dict[str, Tensor]:
        """`embeddings` (m, D) and `features` (m, d) of the patches of one picture (C, H, W) that stay (h, w)."""
        tower: Any = getattr(self.tower, "vision_model", self.tower)
        first = int(self._has_cls)
        kept = torch.cat([torch.ones(first, dtype=torch.bool), stays.flatten()]).to(self.device)
        hidden = tower.embeddings(picture[None].to(self.device))[:, kept]
        states = [tower.pre_layrnorm(hidden) if self._has_cls else hidden]
        for block in _blocks(self.tower)[: max(self._layers)]:
            states.append(block(states[-1], attention_mask=None))
        features = torch.cat([states[layer][0, first:] for layer in self._layers], dim=-1)
        return {"embeddings": self.projector(features[None])[0], "features": features}

    @torch.inference_mode()
    def _forward_merging(self, pixels: Tensor, merging: InTower) -> dict[str, Tensor]:
        """`embeddings` (B, m, D), `features` (B, m, d), `anchors` and `sizes` (B, m) of what is left."""
        tower: Any = getattr(self.tower, "vision_model", self.tower)
        hidden = tower.embeddings(pixels.to(self.device))
        hidden = tower.pre_layrnorm(hidden) if self._has_cls else hidden
        blocks = list(_blocks(self.tower)[: self._layers[0]])
        merged = run_blocks(blocks, hidden, int(self._has_cls), merging, _attend, _feed_forward)
        return {
            "embeddings": self.projector(merged.hidden),
            "features": merged.hidden,
            "anchors": merged.anchors,
            "sizes": merged.sizes,
        }

    def _encode_clip(self, frames: Tensor, needs: frozenset[str]) -> VisualTokens:
        return join_frames(self._encode_pictures([frames], "video", needs), self._pool)

    def preprocess(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB (H, W, 3) pictures to (B, 3, h, w) for the tower, by the checkpoint's image processor."""
        return self.image_processor(images=list(pictures), input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]

    def _grid(self, pixels: Tensor, num_tokens: int) -> Grid:
        patch = self.config.vision_config.patch_size
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        # No grid when "full" leaves [CLS] among the tokens, or "default" takes a patch from a tower without [CLS].
        return (1, height, width) if height * width == num_tokens else (1, 1, num_tokens)

    @torch.inference_mode()
    def _forward(self, pixels: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
        """`embeddings` (B, N, D), and of the auxiliary features (B, ..., N) what is needed."""
        deepest = max(self._layers)
        taps = needs & self.provides & {CLS_ATTENTION, ATTENTION_RECEIVED, TOWER_KEYS}
        wanted = [*self._layers, deepest - 1] if taps else self._layers
        output = self.tower(pixels.to(self.device), output_hidden_states=wanted_states(wanted), return_dict=True)
        first = self._first_token()
        hidden = [output.hidden_states[layer][:, first:] for layer in self._layers]
        features = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=-1)
        outputs = {"embeddings": self.projector(features)}
        if TOWER_FEATURES in needs:
            outputs[TOWER_FEATURES] = features.float().mT
        if CLIP_EMBEDDINGS in needs:
            outputs[CLIP_EMBEDDINGS] = self.clip_space().project(features)
        if taps:
            block, states = _blocks(self.tower)[deepest - 1], output.hidden_states[deepest - 1]
            observed = observed_in_block(block, states, taps, self._has_cls)
            outputs |= {name: plane[..., first:] for name, plane in observed.items()}
        return outputs


def _feature_layers(config: Any) -> list[int]:
    """Indices into the tower's hidden states, all positive. Removes the blocks above the deepest from `config`."""
    vision, given = config.vision_config, config.vision_feature_layer
    num_states = vision.num_hidden_layers + 1
    layers = [layer % num_states for layer in ([given] if isinstance(given, int) else given)]
    if vision.model_type in SEQUENTIAL_TOWERS:
        vision.num_hidden_layers = max(*layers, 1)
    return layers


def _renamer(module: nn.Module, pattern: re.Pattern[str]) -> Rename:
    """Checkpoint key to the module's own name, or None for weights that the module does not have.

    Some checkpoints nest the tower's weights under `vision_model.` and some do not. The same holds for the classes of
    different transformers versions.
    """
    own = {re.sub(r"^vision_model\.", "", name): name for name in module.state_dict()}

    def rename(key: str) -> str | None:
        match = pattern.match(key)
        return own.get(match[1]) if match else None

    return rename


def _blocks(tower: Any) -> nn.ModuleList:
    return getattr(tower, "vision_model", tower).encoder.layers


def _has_cls(tower: Any) -> bool:
    return hasattr(getattr(getattr(tower, "vision_model", tower), "embeddings", None), "class_embedding")


def _attend(block: Any, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block of CLIP or SigLIP up to its MLP; see `encoders.helpers.merging.Attend`."""
    attention, states = block.self_attn, block.layer_norm1(hidden)
    heads = [
        project(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias, scale=attention.scale)
    return hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2)), heads[1]


def _feed_forward(block: Any, hidden: Tensor) -> Tensor:
    return hidden + block.mlp(block.layer_norm2(hidden))
