"""Towers that let a reducer remove cells of a picture before they see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.errors import ReducerFault
from mm.plugins.reducer import BeforeTower
from mm.plugins.registry import name_of
from mm.plugins.threads import plugin_errors


def kept_cells(dropping: BeforeTower, pixels: Tensor) -> Tensor:
    """(t, h, w) bool: the cells of (t, h, w, n) that the reducer keeps.

    Raises:
        ReducerFault: It failed, or did not say it for each cell, or kept none.
    """
    name = name_of(dropping)
    with plugin_errors(name, "before the tower"):
        keep = dropping.keep_cells(pixels)
        if keep.dtype != torch.bool or keep.shape != pixels.shape[:3]:
            what = f"has to say of each of {tuple(pixels.shape[:3])} cells whether it stays, by bools"
            raise ReducerFault(name, f"{what}, not by {keep.dtype} of shape {tuple(keep.shape)}")
        if not bool(keep.any()):
            raise ReducerFault(name, f"kept none of {keep.numel()} cells; at least one has to stay")
    return keep


T = TypeVar("T")


def encode_dropping(
    items: Sequence[T],
    dropping: BeforeTower,
    cells: Callable[[T], Tensor],
    encode_whole: Callable[[Sequence[T]], Sequence[VisualTokens]],
    encode_kept: Callable[[T, Tensor], VisualTokens],
) -> list[VisualTokens]:
    """The tokens of items of which a reducer removes cells. Those that keep all their cells go through as one batch.

    Args:
        cells: The cells (t, h, w, n) of an item.
        encode_whole: Encodes items as they are.
        encode_kept: Encodes the cells of an item that (t, h, w) bools keep.
    """
    kept = [kept_cells(dropping, cells(item)) for item in items]
    is_whole = [bool(keep.all()) for keep in kept]
    whole = iter(encode_whole([item for item, alone in zip(items, is_whole, strict=True) if alone]))
    return [
        next(whole) if alone else encode_kept(item, keep)
        for item, keep, alone in zip(items, kept, is_whole, strict=True)
    ]


class Normalises(Protocol):
    """An image or video processor of transformers. Some lack a part of it."""

    image_std: Sequence[float]
    rescale_factor: float
    do_normalize: bool


def value_ranges(processor: Normalises, num_channels: int) -> Tensor:
    """(C,) float32: by what a processor's pixels are multiplied so that 1 is the range from black to white."""
    std = getattr(processor, "image_std", None)
    scale = float(getattr(processor, "rescale_factor", 1 / 255)) * 255
    normalises = getattr(processor, "do_normalize", True) and std is not None
    return torch.tensor(std if normalises else [1.0] * num_channels, dtype=torch.float32) / scale


def picture_cells(pictures: Tensor, side: int, ranges: Tensor) -> Tensor:
    """(T, h, w, n) of pictures (T, C, H, W): cells of `side` x `side` pixels; zeros beyond the border."""
    pixels = pictures.float() * ranges.view(1, -1, 1, 1)
    height, width = pixels.shape[2:]
    pixels = torch.nn.functional.pad(pixels, (0, -width % side, 0, -height % side))
    return pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def tokens_of_cells(
    embeddings: Tensor,
    keep: Tensor,
    kind: Kind,
    aux_features: dict[str, Tensor],
    seconds_per_step: float | None = None,
) -> VisualTokens:
    """The tokens (m, D) of the m cells that were kept, in reading order, at their places."""
    steps, height, width = keep.shape
    grid: Grid = (steps, height, width)
    return VisualTokens(
        embeddings=embeddings,
        positions=keep.nonzero(),
        sizes=torch.ones(len(embeddings), device=embeddings.device),
        grid=grid,
        kind=kind,
        aux_features=aux_features,
        seconds_per_step=seconds_per_step,
    )
