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
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE_TEMPERATURE = 0.5
MOMENTUM = 0.8
PE_BASE = 10000.0


@dataclass(frozen=True)
class CubeShape:
    """side: of a frame's grid; query_side: of the grid of queries; thumbnail_side: of the thumbnail's."""

    width: int
    side: int = 8
    query_side: int = 4
    thumbnail_side: int = 2
    num_heads: int = 4
    scale: float = 1.0

    @property
    def tokens_per_cube(self) -> int:
        return self.query_side**2

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def num_borders(num_frames: int, frames_per_cube: int) -> int:
    """Cubes less one: max(round(F / frames per cube) - 1, 1), ties to even; none for one frame."""
    return min(max(0, num_frames - 1), max(round(num_frames / frames_per_cube) - 1, 1))


def momentum(frames: Tensor) -> Tensor:
    """(F, ...) → (F - 1, ...), the changes that lead to frames 1, 2, ..."""
    found: list[Tensor] = []
    for before, after in pairwise(frames):
        change = after - before
        found.append(MOMENTUM * change + (1 - MOMENTUM) * found[-1] if found else change)
    return torch.stack(found) if found else frames[:0]


def pick_borders(score: Tensor, count: int) -> list[int]:
    """First frames of the cubes, ascending, with 0. score (F - 1,): of frames 1, 2, ...; the earlier wins a tie."""
    chosen = score.sort(descending=True, stable=True).indices[:count] + 1
    return [0, *sorted(chosen.tolist())]


def onsets(share: Tensor) -> Tensor:
    """(F - 1,) how much each change begins something: its share less that of the change before it.

    Of changes that go on, a little remains, so that what borders are left over fall on them.
    """
    return share - F.pad(share[:-1], (1, 0)) + 0.1 * share


def uniform_borders(num_frames: int, count: int) -> list[int]:
    """As many cubes of about one length."""
    return [i * num_frames // (count + 1) for i in range(count + 1)]


def grid_means(frames: Tensor, side: int, blocks: int) -> Tensor:
    """(..., side * side, D) → (..., blocks * blocks, D): means of square blocks."""
    *lead, _, width = frames.shape
    size = side // blocks
    return frames.view(*lead, blocks, size, blocks, size, width).mean((-4, -2)).flatten(-3, -2)


def position_encoding(times: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(N, width): sines and cosines, 2/8 of the channels for the time, 3/8 for the row, 3/8 for the column."""
    parts = []
    for at, share in ((times, 2), (rows, 3), (columns, 3)):
        half = width * share // 16
        frequencies = PE_BASE ** -(torch.arange(half, device=at.device) / half)
        angles = at.float()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)


def cell_at(index: Tensor, side: int) -> tuple[Tensor, Tensor]:
    return index // side, index % side


class Cubing(nn.Module):
    """Frames (F, n, D) → logits (F - 1, 2) of the changes; class 1 = a cube begins here."""

    def __init__(self, shape: CubeShape) -> None:
        super().__init__()
        self.shape = shape
        self.aggregate = nn.Linear(shape.width, shape.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.width), nn.GELU(), nn.Linear(shape.width, 2)
        )

    def forward(self, frames: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, enabled=False):
            change = momentum(frames.float() / self.shape.scale)
            return self.mlp(F.gelu(self.aggregate(change)).mean(-2))


def gumbel_share(logits: Tensor, noise: float, rng: torch.Generator | None) -> Tensor:
    """(F - 1,) share of class 1, with so much Gumbel noise; 0 at inference."""
    if noise:
        uniform = torch.rand(logits.shape, generator=rng, device=logits.device).clamp(1e-6, 1 - 1e-6)
        logits = logits.float() - noise * (-uniform.log()).log()
    return (logits.float() / NOISE_TEMPERATURE).softmax(-1)[..., 1]


class Resampler(nn.Module):
    """The tokens of one cube (T, n, D) → (tokens_per_cube, D)."""

    def __init__(self, shape: CubeShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape.tokens_per_cube, width), std=0.02))
        self.kv = nn.Linear(width, width, bias=False)
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, shape.num_heads, batch_first=True)
        self.norm_out = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)
        index, block = torch.arange(shape.tokens_per_cube), shape.side / shape.query_side
        row, column = cell_at(index, shape.query_side)
        middle = [(x + 0.5) * block - 0.5 for x in (row, column)]
        places = position_encoding(torch.zeros(len(index)), *middle, width)
        self.register_buffer("places", places, persistent=False)

    def forward(self, cube: Tensor) -> Tensor:
        num_frames, num_tokens, width = cube.shape
        kv = self.norm_kv(self.kv(cube.flatten(0, 1)))
        index = torch.arange(num_frames * num_tokens, device=cube.device)
        row, column = cell_at(index % num_tokens, self.shape.side)
        key = kv + position_encoding(index // num_tokens, row, column, width)
        query = self.norm_q(self.queries) + self.places
        mixed, _ = self.attention(query[None], key[None], kv[None], need_weights=False)
        pooled = grid_means(cube.mean(0), self.shape.side, self.shape.query_side)
        return pooled + self.out(self.norm_out(mixed[0])) * self.shape.scale


@dataclass
class Cubes:
    """tokens (C, q, D) of the cubes; thumbnail (k, D); borders: first frame of each cube; logits (F - 1, 2)."""

    tokens: Tensor
    thumbnail: Tensor
    borders: list[int]
    logits: Tensor


class CubeNetwork(nn.Module):
    def __init__(self, shape: CubeShape) -> None:
        super().__init__()
        self.shape, self.cubing, self.resampler = shape, Cubing(shape), Resampler(shape)
        self.thumbnail = nn.Linear(shape.width, shape.width)
        with torch.no_grad():
            self.thumbnail.weight.copy_(torch.eye(shape.width))
            self.thumbnail.bias.zero_()

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
        thumbnail = self.thumbnail(grid_means(shown, self.shape.side, self.shape.thumbnail_side))
        ends = [*borders[1:], num_frames]
        tokens = torch.stack([self.resampler(frames[a:b]) for a, b in zip(borders, ends, strict=True)])
        return Cubes(tokens, thumbnail, borders, logits)


def token_places(shape: CubeShape, num_cubes: int) -> Tensor:
    """(C, q) offsets of the cube tokens from the thumbnail's end: each where the last cell of its block would stand.

    A cube takes as many positions as a frame, so that the same place one cube earlier is as far away as the same place
    one frame earlier is without cubes.
    """
    row, column = cell_at(torch.arange(shape.tokens_per_cube), shape.query_side)
    block = shape.side // shape.query_side
    cell = ((row + 1) * block - 1) * shape.side + (column + 1) * block - 1
    return torch.arange(num_cubes)[:, None] * shape.side**2 + cell


def border_errors(borders: list[int], events: list[int]) -> list[int]:
    """Frames between each event and the nearest border (frame 0 is none)."""
    return [min((abs(b - event) for b in borders[1:]), default=math.inf) for event in events]
