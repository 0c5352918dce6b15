"""Idefics3 and SmolVLM: the vision tower and its pixel-shuffling connector, and nothing else of a checkpoint.

Pictures go through the checkpoint's own image processor, which cuts a large one into rows and columns of square crops
and adds the whole at a crop's size. In float32 the tokens equal `get_image_features` of transformers bit by bit for the
same batch. It does not know prompts, tags or reducers. Clips are not taken.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from encoders.helpers.auxiliary_features import cell_means, observed_in_block
from encoders.helpers.batches import in_groups
from encoders.helpers.fingerprint import fingerprint
from encoders.helpers.text import TextEmbeddings
from mm.data.media import Image, Video
from mm.data.tokens import VisualTokens
from mm.errors import MediaError
from mm.models.checkpoint import BadCheckpoint, fill_buffers, find, load_module, read_config, read_tensors
from mm.plugins.features import ATTENTION_RECEIVED, TEXT_EMBEDDINGS, TOWER_FEATURES, TOWER_KEYS

MODEL_TYPES = ("idefics3", "smolvlm")

MAX_BATCH_CROPS = 32
"""Crops per forward pass; a picture of more goes alone. Up to so many, all pictures of one call are one batch."""

TOWER_KEY = re.compile(r"^(?:model\.)?vision_model\.(.+)$")
CONNECTOR_KEY = re.compile(r"^(?:model\.)?connector\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Crops:
    """One picture as the tower reads it.

    Attributes:
        pixels: (crops, 3, S, S), row by row, the whole picture last.
        layout: Rows and columns of crops; None when there is the whole only.
    """

    pixels: Tensor
    layout: tuple[int, int] | None


class Idefics3Encoder:
    """Pictures to the tokens that an Idefics3 or SmolVLM decoder was trained on, crop by crop.

    The tower has no [CLS]. Auxiliary features are computed when asked for, from its last block, within each crop; a
    token has the mean over the patches that the connector joins.

    Args:
        folder: A checkpoint: a local folder or a hub name.
        device, dtype: Where and in what the tower computes.

    Raises:
        BadCheckpoint: The folder is no such checkpoint, or lacks weights.
    """

    provides: frozenset[str] = frozenset({ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES, TEXT_EMBEDDINGS})
    kinds: frozenset[str] = frozenset({"image"})

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        path = find(folder)
        model_type = read_config(path)["model_type"]
        if model_type not in MODEL_TYPES:
            raise BadCheckpoint(str(path), f"is of model_type {model_type!r}, not one of {', '.join(MODEL_TYPES)}")
        self.config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
        self.processor: Any = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self.device, self.dtype = torch.device(device), dtype
        self.tower, self.connector = _load(path, self.config, self.device, dtype)
        self._text = functools.cache(lambda: TextEmbeddings(path, self.device))
        self.fingerprint: str = self._fingerprint(path, model_type)

    def embed_text(self, text: str) -> Tensor:
        """(T, D) float32: the text's tokens as the decoder embeds them."""
        return self._text()(text)

    def _fingerprint(self, path: Path, model_type: str) -> str:
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        weights = [
            *self.tower.state_dict(prefix="tower.").items(),
            *self.connector.state_dict(prefix="connector.").items(),
        ]
        config = (path / "config.json").read_text()
        return fingerprint(model_type, config, settings, str(self.dtype), tensors=weights)

    def encode(self, items: Sequence[Image | Video], needs: frozenset[str] = frozenset()) -> list[VisualTokens]:
        """One `VisualTokens` per picture, in order; the steps of its grid are its crops.

        Raises:
            MediaError: A clip.
            CapacityError: The device has no memory for one picture.
        """
        pictures = []
        for item in items:
            if not isinstance(item, Image):
                raise MediaError("not_supported", item.kind)
            pictures.append(self.preprocess(item))
        sizes = [len(picture.pixels) for picture in pictures]
        taps = needs & {ATTENTION_RECEIVED, TOWER_KEYS, TOWER_FEATURES}
        forward = functools.partial(self._forward_observed, taps=taps) if taps else self._forward
        outputs = in_groups(forward, pictures, sizes, MAX_BATCH_CROPS)
        return [self._tokens(*pair) for pair in zip(pictures, outputs, strict=True)]

    def preprocess(self, image: Image) -> Crops:
        """The picture's crops by the checkpoint's own image processor."""
        found = self.processor(
            images=[image.pixels], input_data_format="channels_last", return_row_col_info=True, return_tensors="pt"
        )
        rows, columns = found["rows"][0][0], found["cols"][0][0]
        return Crops(pixels=found["pixel_values"][0], layout=(rows, columns) if rows else None)

    @torch.inference_mode()
    def _forward(self, pictures: Sequence[Crops]) -> list[dict[str, Tensor]]:
        """`embeddings` (crops, n, D) of each picture."""
        tokens = self.connector(self.tower(self._pixels(pictures)).last_hidden_state)
        return _per_picture({"embeddings": tokens}, pictures)

    @torch.inference_mode()
    def _forward_observed(self, pictures: Sequence[Crops], taps: frozenset[str]) -> list[dict[str, Tensor]]:
        """The same, and the auxiliary features (crops, ..., n) that `taps` names."""
        pixels, last = self._pixels(pictures), len(self.tower.encoder.layers) - 1
        output = self.tower(pixels, output_hidden_states=[last])
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
        cell = self.config.vision_config.patch_size * self.config.scale_factor
        height, width = picture.pixels.shape[-2] // cell, picture.pixels.shape[-1] // cell
        grid = (len(picture.pixels), height, width)
        aux_features = {
            name: plane.movedim(0, -2).flatten(-2) for name, plane in output.items() if name != "embeddings"
        }
        return VisualTokens.full(output["embeddings"].flatten(0, 1), grid, "image", aux_features, crops=picture.layout)


def _per_picture(planes: dict[str, Tensor], pictures: Sequence[Crops]) -> list[dict[str, Tensor]]:
    counts = [len(picture.pixels) for picture in pictures]
    split = zip(*(plane.split(counts) for plane in planes.values()), strict=True)
    return [dict(zip(planes, parts, strict=True)) for parts in split]


def _load(path: Path, config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    with torch.device("meta"):
        tower: Any = AutoModel.from_config(config.vision_config)
        # SmolVLM's connector is a copy of this one.
        connector = Idefics3Connector(config)
    fill_buffers(tower, device)
    for module, pattern in ((tower, TOWER_KEY), (connector, CONNECTOR_KEY)):
        tensors = read_tensors(path, lambda key, found=pattern: match[1] if (match := found.match(key)) else None)
        load_module(module, tensors, dtype=dtype, device=str(device), folder=path)
    return tower.eval(), connector.eval()
