"""Qwen2-VL and Qwen2.5-VL: the vision tower with its 2 x 2 merger, and nothing else of a checkpoint.

Reads only these tensors, so that an encoder process never holds the language model. Pictures go through the
checkpoint's own image and video processors, which keep each item's shape: the grid differs from item to item, and
several items are one packed row of patches. In float32 the tokens equal `get_image_features` and `get_video_features`
of transformers bit by bit for the same batch. It does not know prompts, placeholders or reducers.

A clip's frames are joined by `temporal_patch_size` (two) to one step in time; an odd last frame is repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from encoders.batches import in_groups
from encoders.fingerprint import fingerprint
from mm.core.data import Grid, Image, Kind, Video, VisualTokens
from mm.core.errors import MediaError
from mm.models.checkpoint import BadCheckpoint, fill_buffers, find, load_module, read_config, read_tensors

TOWERS: dict[str, Any] = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
}
"""model_type to the class of its tower, merger included."""

MAX_BATCH_PATCHES = 32768
"""Patches per forward pass; a larger item goes alone. Up to so many, all images of one call are one batch, and all its
clips another, as in `generate` of transformers."""

MAX_ASPECT = 200
"""Longest over shortest side that the processors take."""

TOWER_KEY = re.compile(r"^(?:model\.)?visual\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Patches:
    """One item as the tower reads it.

    Attributes:
        pixels: (t * h * w, channels of a patch), in the tower's own order.
        grid: Patches along time, height and width, before the merger.
    """

    pixels: Tensor
    grid: Grid


class Qwen2VLEncoder:
    """Images and clips of any size to the tokens that a Qwen2-VL or Qwen2.5-VL decoder was trained on.

    It supplies no evidence: the tower has no [CLS], and most of its blocks see one window of a picture only.

    Args:
        folder: A checkpoint: a local folder or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder is no such checkpoint, or lacks weights.
    """

    provides: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset({"image", "video"})

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        path = find(folder)
        model_type = read_config(path)["model_type"]
        if model_type not in TOWERS:
            raise BadCheckpoint(str(path), f"is of model_type {model_type!r}, not one of {', '.join(TOWERS)}")
        self.config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.video_processor: Any = AutoVideoProcessor.from_pretrained(path, local_files_only=True)
        self.device, self.dtype = torch.device(device), dtype
        self.tower = _load(path, self.config, self.device, dtype)
        self._merge: int = self.config.vision_config.spatial_merge_size
        self.fingerprint: str = self._fingerprint(path, model_type)

    def _fingerprint(self, path: Path, model_type: str) -> str:
        settings = [
            json.dumps(processor.to_dict(), sort_keys=True, default=str)
            for processor in (self.image_processor, self.video_processor)
        ]
        config = (path / "config.json").read_text()
        return fingerprint(model_type, config, *settings, str(self.dtype), tensors=self.tower.state_dict().items())

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order. Images are batched together, clips are batched together.

        Raises:
            MediaError: An item is too long and thin for the processor.
            CapacityError: The device has no memory for one item.
        """
        images = self._encode([self.image_patches(item) for item in items if isinstance(item, Image)])
        clips = self._encode([self.clip_patches(item) for item in items if isinstance(item, Video)])
        return [
            self._tokens(*next(images), "image", None)
            if isinstance(item, Image)
            else self._tokens(*next(clips), "video", self.seconds_per_step(item))
            for item in items
        ]

    def image_patches(self, image: Image) -> Patches:
        """The picture by the checkpoint's own image processor."""
        _check_aspect(image.pixels.shape[:2], "image")
        found = self.image_processor(images=[image.pixels], input_data_format="channels_last", return_tensors="pt")
        return Patches(pixels=found["pixel_values"], grid=_grid(found["image_grid_thw"]))

    def clip_patches(self, clip: Video) -> Patches:
        """All frames of the clip by the checkpoint's own video processor; it chooses none of its own."""
        _check_aspect(clip.frames.shape[1:3], "video")
        found = self.video_processor(
            videos=[clip.frames], do_sample_frames=False, input_data_format="channels_last", return_tensors="pt"
        )
        return Patches(pixels=found["pixel_values_videos"], grid=_grid(found["video_grid_thw"]))

    def seconds_per_step(self, clip: Video) -> float:
        """Clip time that one step of the grid stands for: `second_per_grid_ts` of transformers."""
        return self.video_processor.temporal_patch_size * clip.duration_s / len(clip.frames)

    def _encode(self, items: Sequence[Patches]):
        embeddings = in_groups(self._forward, items, [len(item.pixels) for item in items], MAX_BATCH_PATCHES)
        return zip(items, embeddings, strict=True)

    @torch.inference_mode()
    def _forward(self, items: Sequence[Patches]) -> list[Tensor]:
        """Merged tokens (N, D) of each item, in raster order."""
        pixels = torch.cat([item.pixels for item in items]).to(self.device, self.dtype)
        grids = torch.tensor([item.grid for item in items], device=self.device)
        merged = self.tower(pixels, grid_thw=grids).pooler_output
        return list(merged.split([len(item.pixels) // self._merge**2 for item in items]))

    def _tokens(self, patches: Patches, embeddings: Tensor, kind: Kind, seconds_per_step: float | None) -> VisualTokens:
        steps, height, width = patches.grid
        grid = (steps, height // self._merge, width // self._merge)
        return VisualTokens.full(embeddings, grid, kind, seconds_per_step=seconds_per_step)


def _load(path: Path, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        tower = TOWERS[config.model_type]._from_config(config.vision_config)
    tensors = read_tensors(path, lambda key: match[1] if (match := TOWER_KEY.match(key)) else None)
    fill_buffers(tower, device)
    load_module(tower, tensors, dtype=dtype, device=str(device), folder=path)
    return tower.eval()


def _grid(grid_thw: Tensor) -> Grid:
    steps, height, width = grid_thw[0].tolist()
    return steps, height, width


def _check_aspect(sides: Sequence[int], kind: Kind) -> None:
    if max(sides) > MAX_ASPECT * min(sides):
        raise MediaError("bad_aspect", kind, MAX_ASPECT)
