"""Qwen2-VL and Qwen2.5-VL: the vision tower of a checkpoint with its 2 x 2 merger.

Pictures go through the checkpoint's image and video processors, which keep each item's aspect ratio. So the grid
differs from item to item, and the patches of several items are packed into one sequence. In float32 the tokens are
bit-equal to `get_image_features` and `get_video_features` of transformers for the same batch.

Each `temporal_patch_size` (two) frames of a clip are one step in time. An odd last frame is repeated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoVideoProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from encoders.checkpoint_encoder import CheckpointEncoder
from encoders.helpers.auxiliary_features import mean_attention
from encoders.helpers.batches import in_groups
from encoders.helpers.cells import encode_dropping, tokens_of_cells, value_ranges
from encoders.helpers.hidden_states import wanted_states
from mm.data.media import Image, Kind, Video
from mm.data.tokens import Grid, VisualTokens
from mm.errors import MediaError
from mm.models.pretrained import from_folder
from mm.plugins.features import (
    ATTENTION_RECEIVED,
    BLOCK_KEYS,
    PATCHES,
    RESOLUTION,
    TEXT_EMBEDDINGS,
    TOWER_FEATURES,
    TOWER_KEYS,
)
from mm.plugins.reducer import BeforeTower

TOWERS: dict[str, Any] = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
}
"""model_type to the class of its tower, which includes the merger."""

MAX_BATCH_PATCHES = 32768
"""Patches per forward. Up to this number, the images of one call are one batch and its clips another, as in `generate`
of transformers. A larger item is a batch by itself."""

MAX_ASPECT = 200
"""Longest over shortest side that the processors accept."""

TOWER_KEY = re.compile(r"^(?:model\.)?visual\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Patches:
    """One item as the tower's input.

    Attributes:
        pixels: (t * h * w, channels of a patch), in the order that the tower uses.
        grid: Patches along time, height and width, before the merger.
        seconds_per_step: Clip time that one step of the grid stands for: `second_per_grid_ts` of transformers. None for
            a picture.
    """

    kind: Kind
    pixels: Tensor
    grid: Grid
    seconds_per_step: float | None = None


class Qwen2VLEncoder(CheckpointEncoder):
    """Images and clips of any size to the tokens that a Qwen2-VL or Qwen2.5-VL decoder was trained on.

    The tower has no [CLS]. Auxiliary features are computed on request, within each step in time. They come from the
    last block whose attention covers whole frames. A token has the mean over the patches that the merger joins.

    Args:
        folder: A checkpoint: a local folder or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder is no such checkpoint, or lacks weights.
    """

    checkpoint_types = tuple(TOWERS)
    provides: frozenset[str] = frozenset(
        {ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS, PATCHES, RESOLUTION}
    )
    kinds: frozenset[str] = frozenset({"image", "video"})
    lacks: ClassVar[dict[str, str]] = {
        BLOCK_KEYS: "this tower joins squares of patches, which merging one by one takes apart"
    }
    """Why something is not provided."""

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(folder, device, dtype)
        self.video_processor: Any = from_folder(AutoVideoProcessor, self.path)
        self.tower: Any = self.load(lambda: TOWERS[self.model_type]._from_config(self.config.vision_config), TOWER_KEY)
        self._merge: int = self.config.vision_config.spatial_merge_size
        self.finish({"tower": self.tower}, self.video_processor)

    def encode(
        self,
        items: Sequence[Image | Video | Patches],
        needs: frozenset[str] = frozenset(),
        dropping: BeforeTower | None = None,
    ) -> list[VisualTokens]:
        """One `VisualTokens` per item, in order. Images are batched together, clips are batched together.

        Args:
            dropping: A reducer whose cells never enter the tower. Items that lose none are computed as without it.

        Raises:
            MediaError: An item is too long and thin for the processor.
            CapacityError: The device has no memory for one item.
        """
        prepared = [item if isinstance(item, Patches) else self.prepare(item) for item in items]
        if dropping is not None:
            return self._encode_dropping(prepared, needs, dropping)
        images = self._encode([item for item in prepared if item.kind == "image"], needs)
        clips = self._encode([item for item in prepared if item.kind == "video"], needs)
        return [self._tokens(*next(images if item.kind == "image" else clips)) for item in prepared]

    def _encode_dropping(
        self, items: Sequence[Patches], needs: frozenset[str], dropping: BeforeTower
    ) -> list[VisualTokens]:
        return encode_dropping(
            items,
            dropping,
            self._cells,
            lambda whole: self.encode(whole, needs),
            lambda item, keep: self._encode_kept(item, keep, needs),
        )

    def _cells(self, item: Patches) -> Tensor:
        """(t, h, w, n): the pixels of each token's patches."""
        processor = self.image_processor if item.kind == "image" else self.video_processor
        pixels = item.pixels.float().unflatten(1, (3, -1)) * value_ranges(processor, 3).unsqueeze(1)
        return pixels.reshape(*self.grid_of(item), -1)

    def _encode_kept(self, item: Patches, keep: Tensor, needs: frozenset[str]) -> VisualTokens:
        outputs = in_groups(
            lambda _: [self._forward_kept(item, keep, needs)], [item], [len(item.pixels)], len(item.pixels)
        )
        embeddings = outputs[0].pop("embeddings")
        return tokens_of_cells(embeddings, keep.to(self.device), item.kind, outputs[0], item.seconds_per_step)

    @torch.inference_mode()
    def _forward_kept(self, item: Patches, keep: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
        """`embeddings` (m, D) of the kept tokens, and the tower's features (d, m) if needed.

        The tower of transformers takes positions and the borders of attention beside the patches: those of the kept.
        """
        grids, unit, cells = torch.tensor([item.grid]), self._merge**2, keep.flatten()
        patches = cells.repeat_interleave(unit)
        given = {
            "position_ids": get_vision_position_ids(grids, self._merge)[patches].to(self.device),
            "cu_seqlens": _borders(
                torch.arange(len(keep)).repeat_interleave(keep[0].numel())[cells], unit, self.device
            ),
        }
        order = None
        if hasattr(self.tower, "window_size"):
            index, ends = get_vision_window_index(
                grids, self._merge, self.tower.window_size, self.tower.config.patch_size
            )
            windows = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff() // unit)
            kept = cells[index]
            order = torch.cumsum(cells, 0)[index[kept]] - 1
            given |= {
                "window_index": order.to(self.device),
                "cu_window_seqlens": _borders(windows[kept], unit, self.device),
            }
        pixels = item.pixels[patches].to(self.device, self.dtype)
        output = self.tower(pixels, grid_thw=grids.to(self.device), **given)
        found = {"embeddings": output.pooler_output}
        if TOWER_FEATURES in needs:
            features = output.last_hidden_state.float().unflatten(0, (-1, unit)).mean(dim=1)
            found[TOWER_FEATURES] = (features if order is None else features[torch.argsort(order)]).mT
        return found

    def prepare(self, item: Image | Video, resolution: float | None = None) -> Patches:
        """The item as the tower's input.

        Args:
            resolution: At most so many of the item's own tokens, by a smaller picture; each step has at least one.
        """
        own = self.image_patches(item) if isinstance(item, Image) else self.clip_patches(item)
        if resolution is None or resolution >= 1:
            return own
        side = self.config.vision_config.patch_size
        pixels = max(self._merge**2, int(len(own.pixels) // own.grid[0] * resolution)) * side**2
        size = {"shortest_edge": side**2, "longest_edge": pixels}  # of one frame
        return self.image_patches(item, size=size) if isinstance(item, Image) else self.clip_patches(item, size=size)

    def grid_of(self, prepared: Patches) -> Grid:
        """The grid of the item's tokens."""
        steps, height, width = prepared.grid
        return steps, height // self._merge, width // self._merge

    def image_patches(self, image: Image, **options: object) -> Patches:
        """The picture's patches, by the checkpoint's image processor."""
        _check_aspect(image.pixels.shape[:2], "image")
        found = self.image_processor(
            images=[image.pixels], input_data_format="channels_last", return_tensors="pt", **options
        )
        return Patches(kind="image", pixels=found["pixel_values"], grid=_grid(found["image_grid_thw"]))

    def clip_patches(self, clip: Video, **options: object) -> Patches:
        """The patches of all frames of the clip, by the checkpoint's video processor. It samples no frames itself."""
        _check_aspect(clip.frames.shape[1:3], "video")
        found = self.video_processor(
            videos=[clip.frames],
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
            **options,
        )
        return Patches(
            kind="video",
            pixels=found["pixel_values_videos"],
            grid=_grid(found["video_grid_thw"]),
            seconds_per_step=self.video_processor.temporal_patch_size * clip.duration_s / len(clip.frames),
        )

    def _encode(self, items: Sequence[Patches], needs: frozenset[str]) -> Iterator[tuple[Patches, dict[str, Tensor]]]:
        taps = needs & {ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES}
        forward = functools.partial(self._forward_observed, taps=taps) if taps else self._forward
        outputs = in_groups(forward, items, [len(item.pixels) for item in items], MAX_BATCH_PATCHES)
        return zip(items, outputs, strict=True)

    @torch.inference_mode()
    def _forward(self, items: Sequence[Patches]) -> list[dict[str, Tensor]]:
        """`embeddings` (N, D) of each item's merged tokens, in raster order."""
        pixels, grids = self._packed(items)
        return self._per_item({"embeddings": self.tower(pixels, grid_thw=grids).pooler_output}, items)

    @torch.inference_mode()
    def _forward_observed(self, items: Sequence[Patches], taps: frozenset[str]) -> list[dict[str, Tensor]]:
        """The same, and the auxiliary features (N, ...) that `taps` names."""
        pixels, grids = self._packed(items)
        index = getattr(self.tower, "fullatt_block_indexes", None) or [len(self.tower.blocks) - 1]
        output = self.tower(pixels, grid_thw=grids, output_hidden_states=wanted_states([max(index)]))
        planes = observed_in_packed_block(self.tower, max(index), output.hidden_states[max(index)], grids, taps)
        if TOWER_FEATURES in taps:
            planes[TOWER_FEATURES] = output.last_hidden_state.float()
        order = window_order(self.tower, grids)
        merged = {name: plane.unflatten(0, (-1, self._merge**2)).mean(dim=1) for name, plane in planes.items()}
        # Inside the tower, tokens are ordered by windows. Its output is in raster order.
        found = {name: plane if order is None else plane[torch.argsort(order)] for name, plane in merged.items()}
        return self._per_item({"embeddings": output.pooler_output} | found, items)

    def _packed(self, items: Sequence[Patches]) -> tuple[Tensor, Tensor]:
        pixels = torch.cat([item.pixels for item in items]).to(self.device, self.dtype)
        return pixels, torch.tensor([item.grid for item in items], device=self.device)

    def _per_item(self, planes: dict[str, Tensor], items: Sequence[Patches]) -> list[dict[str, Tensor]]:
        counts = [len(item.pixels) // self._merge**2 for item in items]
        split = zip(*(plane.split(counts) for plane in planes.values()), strict=True)
        return [dict(zip(planes, parts, strict=True)) for parts in split]

    def _tokens(self, patches: Patches, output: dict[str, Tensor]) -> VisualTokens:
        grid = self.grid_of(patches)
        aux_features = {name: plane.movedim(0, -1) for name, plane in output.items() if name != "embeddings"}
        return VisualTokens.full(
            output["embeddings"], grid, patches.kind, aux_features, seconds_per_step=patches.seconds_per_step
        )


def _borders(parts: Tensor, unit: int, device: torch.device) -> Tensor:
    """(n + 1,) int32: where the patches of each part begin and end, for tokens (m,) of ascending parts."""
    counts = torch.unique_consecutive(parts, return_counts=True)[1] * unit
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device, torch.int32)


def _grid(grid_thw: Tensor) -> Grid:
    steps, height, width = grid_thw[0].tolist()
    return steps, height, width


def _check_aspect(sides: Sequence[int], kind: Kind) -> None:
    if max(sides) > MAX_ASPECT * min(sides):
        raise MediaError("bad_aspect", kind, MAX_ASPECT)


def window_order(tower: nn.Module, grids: Tensor) -> Tensor | None:
    """(N,) int64: the raster index of each merged token in the tower's order; None if that is the raster order."""
    if not hasattr(tower, "window_size"):
        return None
    sizes = cast(Any, tower)
    index, _ = get_vision_window_index(grids, sizes.spatial_merge_size, sizes.window_size, sizes.patch_size)
    return index.to(grids.device)


def observed_in_packed_block(
    tower: nn.Module, index: int, hidden: Tensor, grids: Tensor, names: Set[str]
) -> dict[str, Tensor]:
    """The named auxiliary features (P, ...) float32 of all patches, from the input (P, D) of the block `index`."""
    block = cast(Any, tower).blocks[index]
    attention = block.attn
    states = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
    queries, keys, _ = states.unbind(dim=1)
    found = {TOWER_KEYS: keys.float().mean(dim=1)} if TOWER_KEYS in names else {}
    if ATTENTION_RECEIVED in names:
        cos, sin = (_in_windows(tower, plane, grids) for plane in _rotation(tower, hidden, grids))
        queries, keys = apply_rotary_pos_emb_vision(queries, keys, cos, sin)
        frames = [height * width for steps, height, width in grids.tolist() for _ in range(steps)]
        received = [
            mean_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], attention.scaling)[0].T
            for q, k in zip(queries.split(frames), keys.split(frames), strict=True)
        ]
        found[ATTENTION_RECEIVED] = torch.cat(received)
    return found


def _rotation(tower: Any, hidden: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    return tower.rotary_pos_emb(hidden, get_vision_position_ids(grids, tower.spatial_merge_size))


def _in_windows(tower: Any, plane: Tensor, grids: Tensor) -> Tensor:
    order = window_order(tower, grids)
    return plane if order is None else plane.unflatten(0, (-1, tower.spatial_merge_size**2))[order].flatten(0, 1)
