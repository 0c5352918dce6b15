"""The networks of cubes: where a clip is cut, the resampler that makes tokens of each cube, and the thumbnail.

The module names are those of the stored tensors; demos/train/cubing.py trains them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NOISE_TEMPERATURE = 0.5
MOMENTUM = 0.8
PE_BASE = 10000.0


@dataclass(frozen=True)
class CubeShape:
    """The sizes of the networks.

    Attributes:
        width: D of the decoder.
        side: Of a frame's grid of tokens.
        query_side: Of the grid of queries: a cube becomes its square of tokens.
        thumbnail_side: Of the thumbnail's grid.
        scale: Size of the tokens, by which they are divided first.
    """

    width: int
    side: int = 8
    query_side: int = 4
    thumbnail_side: int = 2
    num_heads: int = 4
    scale: float = 1.0

    @property
    def tokens_per_cube(self) -> int:
        return self.query_side**2


def num_borders(num_frames: int, frames_per_cube: int) -> int:
    """Cubes less one: max(round(F / frames per cube) - 1, 1), ties to even; none for one frame."""
    return min(max(0, num_frames - 1), max(round(num_frames / frames_per_cube) - 1, 1))


def momentum(frames: Tensor, before: Tensor | None = None) -> Tensor:
    """(F, ...) to (F - 1, ...), the changes that lead to frames 1, 2, ...

    Args:
        before: The change that leads to frame 0, where frames came before it.
    """
    found: list[Tensor] = []
    for i in range(1, len(frames)):
        change = frames[i] - frames[i - 1]
        last = found[-1] if found else before
        found.append(change if last is None else MOMENTUM * change + (1 - MOMENTUM) * last)
    return torch.stack(found) if found else frames[:0]


def onsets(share: Tensor, before: Tensor | float = 0.0) -> Tensor:
    """(n,) how much each change begins something: its share less that of the change before it.

    Of changes that go on, a little remains, so that what borders are left over fall on them.

    Args:
        before: Share of the change before the first.
    """
    first = share.new_full((min(1, len(share)),), float(before))
    return share - torch.cat([first, share[:-1]]) + 0.1 * share


def grid_means(frames: Tensor, side: int, blocks: int) -> Tensor:
    """(..., side * side, D) to (..., blocks * blocks, D): means of square blocks."""
    *lead, _, width = frames.shape
    size = side // blocks
    return frames.view(*lead, blocks, size, blocks, size, width).mean((-4, -2)).flatten(-3, -2)


def position_encoding(times: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(N, width): sines and cosines, 2/8 of the channels for the time, 3/8 for the row, 3/8 for the column."""
    parts: list[Tensor] = []
    for at, share in ((times, 2), (rows, 3), (columns, 3)):
        half = width * share // 16
        frequencies = PE_BASE ** -(torch.arange(half, device=at.device) / half)
        angles = at.float()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)


def cell_at(index: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Row and column of cells."""
    return index // side, index % side


def query_cells(shape: CubeShape) -> Tensor:
    """(q,) the cell at which each token of a cube stands: the last of its block."""
    row, column = cell_at(torch.arange(shape.tokens_per_cube), shape.query_side)
    block = shape.side // shape.query_side
    return ((row + 1) * block - 1) * shape.side + (column + 1) * block - 1


class Cubing(nn.Module):
    """Frames (F, n, D) to logits (F - 1, 2) of the changes; class 1 = a cube begins here."""

    def __init__(self, shape: CubeShape) -> None:
        super().__init__()
        self.shape = shape
        self.aggregate = nn.Linear(shape.width, shape.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.width), nn.GELU(), nn.Linear(shape.width, 2)
        )

    def forward(self, frames: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, enabled=False):
            return self.logits(momentum(frames.float() / self.shape.scale))

    def logits(self, change: Tensor) -> Tensor:
        """(n, 2) of changes (n, tokens, D)."""
        return self.mlp(nn.functional.gelu(self.aggregate(change)).mean(-2))


class Resampler(nn.Module):
    """The tokens of one cube (T, n, D) to (tokens_per_cube, D)."""

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
        row, column = ((x + 0.5) * block - 0.5 for x in cell_at(index, shape.query_side))
        places = position_encoding(torch.zeros(len(index)), row, column, width)
        self.register_buffer("places", places, persistent=False)

    def forward(self, cube: Tensor) -> Tensor:
        num_frames, num_tokens, width = cube.shape
        kv = self.norm_kv(self.kv(cube.flatten(0, 1)))
        index = torch.arange(num_frames * num_tokens, device=cube.device)
        row, column = cell_at(index % num_tokens, self.shape.side)
        key = kv + position_encoding(index // num_tokens, row, column, width)
        query = self.norm_q(self.queries) + self.get_buffer("places")
        mixed, _ = self.attention(query[None], key[None], kv[None], need_weights=False)
        pooled = grid_means(cube.mean(0), self.shape.side, self.shape.query_side)
        return pooled + self.out(self.norm_out(mixed[0])) * self.shape.scale


class CubeLayers(nn.Module):
    """The three networks. The thumbnail starts as the identity."""

    def __init__(self, shape: CubeShape) -> None:
        super().__init__()
        self.shape, self.cubing, self.resampler = shape, Cubing(shape), Resampler(shape)
        self.thumbnail = nn.Linear(shape.width, shape.width)
        with torch.no_grad():
            self.thumbnail.weight.copy_(torch.eye(shape.width))
            self.thumbnail.bias.zero_()

    def shown(self, frame: Tensor) -> Tensor:
        """(k, D) thumbnail of a mean of frames (n, D)."""
        return self.thumbnail(grid_means(frame, self.shape.side, self.shape.thumbnail_side))


class CubeNetwork(CubeLayers):
    """As it serves: with the decoder's embeddings of the digits 0 to 9, which date the cubes."""

    def __init__(self, shape: CubeShape) -> None:
        super().__init__(shape)
        self.register_buffer("digits", torch.zeros(10, shape.width))


def share_of(logits: Tensor) -> Tensor:
    """(n,) share of class 1."""
    return (logits.float() / NOISE_TEMPERATURE).softmax(-1)[..., 1]
