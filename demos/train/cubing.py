"""Cubes of a clip: where they begin, the resampler that makes tokens of each, and the thumbnail.

Paper     Quicksviewer, arXiv:2504.15270. Input: frames as the decoder would get them, projected and pooled (F, n, D).
Momentum  m_1 = f_1 - f_0; m_t = .8 (f_t - f_{t-1}) + .2 m_{t-1}; then aggregated over the tokens of a frame, two logits
          per change, Gumbel noise, the frames of the highest share begin a cube. Frame 0 always does.
Cube      all its tokens through cross-attention with learned queries; times count from the cube's own first frame.
Thumbnail the frames at which cubes begin, averaged; first in the prompt. By it the decoder's loss reaches the cubing.
Differs   aggregation has a GELU before the mean: a linear map of the mean is blind to what moves from one place to
          another. Noise is float32 and clamped. One frame is one cube. Thumbnail tokens are square blocks, not runs. A
          query stands at a block of the grid; its output is added to the block's mean over the cube, and starts at
          zero, so that an untrained resampler pools. Frames are divided by one number (`scale`) first. A cube begins
          where the share rises, not where it is highest: a slow event is high in all of its frames.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.learned.cubing import (
    NOISE_TEMPERATURE,
    CubeLayers,
    CubeShape,
    num_borders,
    onsets,
    query_cells,
)


def pick_borders(score: Tensor, count: int) -> list[int]:
    """First frames of the cubes, ascending, with 0. score (F - 1,): of frames 1, 2, ...; the earlier wins a tie."""
    chosen = score.sort(descending=True, stable=True).indices[:count] + 1
    return [0, *sorted(chosen.tolist())]


def uniform_borders(num_frames: int, count: int) -> list[int]:
    """As many cubes of about one length."""
    return [i * num_frames // (count + 1) for i in range(count + 1)]


def gumbel_share(logits: Tensor, noise: float, rng: torch.Generator | None) -> Tensor:
    """(F - 1,) share of class 1, with so much Gumbel noise; 0 at inference."""
    if noise:
        uniform = torch.rand(logits.shape, generator=rng, device=logits.device).clamp(1e-6, 1 - 1e-6)
        logits = logits.float() - noise * (-uniform.log()).log()
    return (logits.float() / NOISE_TEMPERATURE).softmax(-1)[..., 1]


@dataclass
class Cubes:
    """tokens (C, q, D) of the cubes; thumbnail (k, D); borders: first frame of each cube; logits (F - 1, 2)."""

    tokens: Tensor
    thumbnail: Tensor
    borders: list[int]
    logits: Tensor


class CubeNetwork(CubeLayers):
    """As it is trained: with noise, and a path from the decoder's loss to the cubing."""

    def forward(
        self,
        frames: Tensor,
        frames_per_cube: int,
        *,
        borders: list[int] | None = None,
        noise: float = 0.0,
        rng: torch.Generator | None = None,
    ) -> Cubes:
        """frames (F, n, D), F of 1 and more; borders: given ones, such as uniform cubes."""
        num_frames = len(frames)
        logits = self.cubing(frames) if num_frames > 1 else frames.new_zeros(0, 2)
        share = gumbel_share(logits, noise, rng)
        if borders is None:
            borders = pick_borders(onsets(share.detach()), num_borders(num_frames, frames_per_cube))
        hard = torch.zeros(num_frames, device=frames.device)
        hard[borders] = 1.0
        weight = hard + F.pad(share - share.detach(), (1, 0))  # frame 0 has no logits
        shown = (weight[:, None, None] * frames).sum(0) / weight.sum().detach()
        thumbnail = self.shown(shown)
        ends = [*borders[1:], num_frames]
        tokens = torch.stack([self.resampler(frames[a:b]) for a, b in zip(borders, ends, strict=True)])
        return Cubes(tokens, thumbnail, borders, logits)


def token_places(shape: CubeShape, num_cubes: int) -> Tensor:
    """(C, q) offsets of the cube tokens from the thumbnail's end: each where the last cell of its block would stand.

    A cube takes as many positions as a frame, so that the same place one cube earlier is as far away as the same place
    one frame earlier is without cubes.
    """
    return torch.arange(num_cubes)[:, None] * shape.side**2 + query_cells(shape)


def border_errors(borders: list[int], events: list[int]) -> list[int]:
    """Frames between each event and the nearest border (frame 0 is none)."""
    return [min((abs(b - event) for b in borders[1:]), default=math.inf) for event in events]
