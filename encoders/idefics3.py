"""Idefics3 and SmolVLM: the vision tower and the pixel-shuffling connector of a checkpoint.

Pictures go through the checkpoint's image processor. It cuts a large picture into rows and columns of square crops and
adds the whole picture at the size of one crop. In float32 the tokens are bit-equal to `get_image_features` of
transformers for the same batch. Clips are not supported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from encoders.checkpoint_encoder import CheckpointEncoder
from encoders.helpers.auxiliary_features import cell_means, observed_in_block
from encoders.helpers.batches import in_groups
from encoders.helpers.hidden_states import wanted_states
from mm.data.media import Image, Kind, Video
from mm.data.tokens import Grid, VisualTokens
from mm.errors import MediaError
from mm.models.pretrained import build_module
from mm.plugins.features import ATTENTION_RECEIVED, TEXT_EMBEDDINGS, TOWER_FEATURES, TOWER_KEYS

MAX_BATCH_CROPS = 32
"""Crops per forward. Up to this number, the pictures of one call are one batch. A larger picture is one by itself."""

TOWER_KEY = re.compile(r"^(?:model\.)?vision_model\.(.+)$")
CONNECTOR_KEY = re.compile(r"^(?:model\.)?connector\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One picture as the tower's input.

    Attributes:
        pixels: (crops, 3, S, S), row by row. The last one is the whole picture.
        crops: Numbers of rows and columns of crops. None if the whole picture is the only one.
    """

    pixels: Tensor
    crops: tuple[int, int] | None

    @property
    def kind(self) -> Kind:
        return "image"


class Idefics3Encoder(CheckpointEncoder):
    """Pictures to the tokens that an Idefics3 or SmolVLM decoder was trained on, crop by crop.

    The tower has no [CLS]. Auxiliary features are computed on request, from the last block and within each crop. A
    token has the mean over the patches that the connector joins.

    Args:
        folder: A checkpoint: a local folder or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder is no such checkpoint, or lacks weights.
    """

    checkpoint_types = ("idefics3", "smolvlm")
    provides: frozenset[str] = frozenset({ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS})
    kinds: frozenset[str] = frozenset({"image"})

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(folder, device, dtype)
        self.tower: Any = self.load(lambda: build_module(self.path, self.config.vision_config), TOWER_KEY)
        # SmolVLM's connector is a copy of this one.
        self.connector = self.load(lambda: Idefics3Connector(self.config), CONNECTOR_KEY)
        self.finish({"tower": self.tower, "connector": self.connector})

    def encode(self, items: Sequence[Image | Video | Crops], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per picture, in order. The steps of its grid are its crops.

        Raises:
            MediaError: A clip.
            CapacityError: The device has no memory for one picture.
        """
        pictures = [item if isinstance(item, Crops) else self.prepare(item) for item in items]
        sizes = [len(picture.pixels) for picture in pictures]
        taps = needs & {ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES}
        forward = functools.partial(self._forward_observed, taps=taps) if taps else self._forward
        outputs = in_groups(forward, pictures, sizes, MAX_BATCH_CROPS)
        return [self._tokens(*pair) for pair in zip(pictures, outputs, strict=True)]

    def prepare(self, item: Image | Video) -> Crops:
        """The picture's crops by the checkpoint's own image processor."""
        if not isinstance(item, Image):
            raise MediaError("not_supported", item.kind)
        found = self.image_processor(
            images=[item.pixels], input_data_format="channels_last", return_row_col_info=True, return_tensors="pt"
        )
        rows, columns = found["rows"][0][0], found["cols"][0][0]
        return Crops(pixels=found["pixel_values"][0], crops=(rows, columns) if rows else None)

    def grid_of(self, prepared: Crops) -> Grid:
        """The grid of the picture's tokens: its crops, and the cells of one."""
        cell = self.config.vision_config.patch_size * self.config.scale_factor
        return len(prepared.pixels), prepared.pixels.shape[-2] // cell, prepared.pixels.shape[-1] // cell

    @torch.inference_mode()
    def _forward(self, pictures: Sequence[Crops]) -> list[dict[str, Tensor]]:
        """`embeddings` (crops, n, D) of each picture."""
        tokens = self.connector(self.tower(self._pixels(pictures)).last_hidden_state)
        return _per_picture({"embeddings": tokens}, pictures)

    @torch.inference_mode()
    def _forward_observed(self, pictures: Sequence[Crops], taps: frozenset[str]) -> list[dict[str, Tensor]]:
        """The same, and the auxiliary features (crops, ..., n) that `taps` names."""
        pixels, last = self._pixels(pictures), len(self.tower.encoder.layers) - 1
        output = self.tower(pixels, output_hidden_states=wanted_states([last]))
        planes = observed_in_block(self.tower.encoder.layers[last], output.hidden_states[last], taps, has_cls=False)
        if TOWER_FEATURES in taps:
            planes[TOWER_FEATURES] = output.last_hidden_state.mT
        height, width = (side // self.config.vision_config.patch_size for side in pixels.shape[-2:])
        side = self.config.scale_factor
        found = {name: cell_means(plane, height, width, side).flatten(2) for name, plane in planes.items()}
        return _per_picture({"embeddings": self.connector(output.last_hidden_state)} | found, pictures)

    def _pixels(self, pictures: Sequence[Crops]) -> Tensor:
        return torch.cat([picture.pixels for picture in pictures]).to(self.device, self.dtype)

    def _tokens(self, picture: Crops, output: dict[str, Tensor]) -> VisualTokens:
        grid = self.grid_of(picture)
        aux_features = {
            name: plane.movedim(0, -2).flatten(-2) for name, plane in output.items() if name != "embeddings"
        }
        return VisualTokens.full(output["embeddings"].flatten(0, 1), grid, "image", aux_features, crops=picture.crops)


def _per_picture(planes: dict[str, Tensor], pictures: Sequence[Crops]) -> list[dict[str, Tensor]]:
    counts = [len(picture.pixels) for picture in pictures]
    split = zip(*(plane.split(counts) for plane in planes.values()), strict=True)
    return [dict(zip(planes, parts, strict=True)) for parts in split]
