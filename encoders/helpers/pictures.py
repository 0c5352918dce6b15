"""Pictures of one size as a tower's input, and a clip from its encoded frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoders.helpers.auxiliary_features import cell_means
from mm.data.media import Kind
from mm.data.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A picture, or the frames of a clip, as the tower's input.

    Attributes:
        pixels: (T, 3, h, w). A picture has T = 1.
    """

    kind: Kind
    pixels: Tensor


def join_frames(frames: Sequence[VisualTokens], pool: int) -> VisualTokens:
    """One clip from its encoded frames. Each `pool` x `pool` neighbouring tokens are averaged, fewer at a border."""
    _, height, width = frames[0].grid
    embeddings = cell_means(torch.stack([frame.embeddings.T for frame in frames]), height, width, pool)
    _, channels, height_out, width_out = embeddings.shape
    tokens = embeddings.permute(0, 2, 3, 1).reshape(-1, channels).to(frames[0].embeddings.dtype)
    aux_features = {
        name: cell_means(torch.stack([frame.aux_features[name] for frame in frames]), height, width, pool)
        .permute(1, 0, 2, 3)
        .flatten(1)
        for name in frames[0].aux_features
    }
    return VisualTokens.full(tokens, (len(frames), height_out, width_out), "video", aux_features)
