"""Cubes: a clip is cut where something begins, and each cube becomes a few tokens, dated, after a thumbnail.

Paper     Quicksviewer, arXiv:2504.15270. Trained by demos/train/train_cubes.py.
Stage     temporal, in place of the frames' tokens.   Needs  weights for the model, which adapt its decoder too.
Equation  m_1 = f_1 - f_0; m_t = .8 (f_t - f_{t-1}) + .2 m_{t-1}; y_t = share of class 1 of the cubing network at m_t. A
          cube begins where y rises most, at as many frames as the budget allows, and at frame 0. A cube's tokens are a
          resampler's, 16 of all its frames. The thumbnail is the mean of the first frames of all cubes.
Cost      A small network per frame and per cube. Memory does not grow with the clip, but for the tokens that are kept.
Differs   from the paper: a long clip is cut window by window (`WINDOW` changes), each with its part of the budget, so
          that frames may come one chunk at a time, and its thumbnail is that of the first window, so that tokens may go
          on before the clip has ended. A clip of up to a window is as in training. One frame is one cube. Images stay
          as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mm.data.arrays import ints
from mm.data.media import Kind
from mm.data.tokens import Grid, Placement, VisualTokens
from mm.plugins.apply import rewritten
from mm.plugins.reducer import Count, ReduceContext, Reduction, Stage
from mm.plugins.weights import ReducerWeights
from pruning.base import choice_option, int_option, keep_all
from pruning.learned.base import LearnedReducer, started
from pruning.learned.cubing import CubeNetwork, CubeShape, momentum, num_borders, onsets, query_cells, share_of

WINDOW = 64
"""Changes that are compared with one another."""

NOTHING = 1e-6
"""Of how many tokens a thumbnail's or a digit's token stands: sizes are positive."""


@dataclass(frozen=True, kw_only=True)
class Cubes(LearnedReducer):
    """Cut a clip where something begins, and keep a few dated tokens of each piece (Quicksviewer).

    Attributes:
        frames_per_cube: Frames of a cube on average. Higher keeps less. That of the weights if not given.
        borders: "learned", or "uniform" for cubes of about one length, to compare with.
    """

    name: ClassVar[str] = "cubes"
    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.TEMPORAL,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"video"})
    count: ClassVar[Count] = "bounded"
    needs_grid: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    weights: str = "cubes"
    frames_per_cube: int | None = None
    borders: str = "learned"

    def __post_init__(self) -> None:
        choice_option(self.name, "borders", self.borders, ("learned", "uniform"))
        if self.frames_per_cube is not None:
            int_option(self.name, "frames_per_cube", self.frames_per_cube, 1, 10_000)

    @classmethod
    def untrained(cls, width: int) -> ReducerWeights:
        card = {"reducer": cls.name, "width": width, "side": 8, "query_side": 4, "thumbnail_side": 2, "num_heads": 4}
        return started({**card, "scale": 1.0, "default_frames_per_cube": 3}, cls.build)

    @staticmethod
    def build(weights: ReducerWeights) -> CubeNetwork:
        sizes = {name: weights.count(name) for name in ("width", "side", "query_side", "thumbnail_side", "num_heads")}
        shape = CubeShape(**sizes, scale=weights.number("scale"))
        if shape.side % shape.query_side or shape.side % shape.thumbnail_side or shape.width % 16:
            raise weights.bad("have a card whose sides or width do not divide as a grid of tokens does")
        if shape.width % shape.num_heads or not shape.scale > 0:
            raise weights.bad("have a card whose num_heads or scale no network has")
        if shape.thumbnail_side**2 + 1 > int(query_cells(shape)[0]):
            raise weights.bad("have a card with a thumbnail that leaves no room for the number of a frame")
        return CubeNetwork(shape)

    def resolve(self, weights: ReducerWeights) -> Mapping[str, Any]:
        return {"frames_per_cube": self.frames_per_cube or weights.count("default_frames_per_cube")}

    @property
    def shape(self) -> CubeShape:
        return cast(CubeNetwork, self.network).shape

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        if kind not in self.kinds or not num_tokens or grid is None or self.loaded is None:
            return num_tokens
        shape, num_frames = self.shape, grid[0]
        cubes = num_borders(num_frames, self.frames_per_cube or 1) + 1
        return shape.thumbnail_side**2 + cubes * (shape.tokens_per_cube + len(str(num_frames - 1)))

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        if tokens.kind not in self.kinds or not tokens.num_tokens:
            return keep_all(tokens)
        stream = self.stream()
        stream.add(tokens)
        return stream.decide()

    def stream(self) -> CubeStream:
        """Takes the frames of one clip chunk by chunk."""
        assert self.frames_per_cube is not None
        assert self.loaded is not None
        return CubeStream(
            cast(CubeNetwork, self.network), self.frames_per_cube, self.loaded, uniform=self.borders == "uniform"
        )


class CubeStream:
    """One clip, whose frames come in chunks. What it holds does not grow, but for the tokens that are kept.

    Args:
        network: The reducer's.
        frames_per_cube: The budget.
        weights: For errors.
        uniform: Cut at equal distances, and not where something begins.
    """

    def __init__(
        self, network: CubeNetwork, frames_per_cube: int, weights: ReducerWeights, *, uniform: bool = False
    ) -> None:
        self._network, self._frames_per_cube, self._weights = network, frames_per_cube, weights
        self._uniform = uniform
        self._num_frames = 0
        self._open = torch.zeros(0)  # the frames since the last border that is settled, (f, n, D)
        self._change: Tensor | None = None
        self._share = 0.0
        self._scores: list[Tensor] = []  # of the changes of this window
        self._borders: list[int] = []
        self._cubes: list[Tensor] = []
        self._first_frames = torch.zeros(0)
        self._thumbnail: Tensor | None = None  # known after the first window
        self._like: VisualTokens | None = None

    @torch.no_grad()
    def add(self, tokens: VisualTokens) -> None:
        """The tokens of the next frames.

        Raises:
            BadWeights: The weights are for frames of another grid.
        """
        side = self._network.shape.side
        num_frames, height, width = tokens.grid
        if (height, width) != (side, side):
            raise self._weights.bad(f"are for frames of {side}x{side} tokens, and these have {height}x{width}")
        if self._like is None:
            self._like = tokens
        frames = tokens.embeddings.float().view(num_frames, height * width, -1)
        at = 0
        while at < num_frames:
            room = WINDOW + 1 - len(self._scores) if not self._num_frames else WINDOW - len(self._scores)
            part = frames[at : at + room]
            self._watch(part)
            at += len(part)
            if len(self._scores) == WINDOW:
                self._settle()

    def _watch(self, frames: Tensor) -> None:
        """Score the changes that lead to these frames."""
        scale = self._network.shape.scale
        before = self._open[-1:] if self._num_frames else frames[:0]
        change = momentum(torch.cat([before, frames]) / scale, self._change)
        if len(change):
            share = share_of(self._network.cubing.logits(change))
            self._scores += list(onsets(share, self._share))
            self._change, self._share = change[-1], float(share[-1])
        if not self._num_frames:
            self._begin(0, frames[0])
        self._open = torch.cat([self._open, frames]) if len(self._open) else frames
        self._num_frames += len(frames)

    def _begin(self, frame: int, tokens: Tensor) -> None:
        self._borders.append(frame)
        self._first_frames = tokens if len(self._borders) == 1 else self._first_frames + tokens

    def _settle(self) -> None:
        """Choose the borders of this window, and make tokens of the cubes that they end."""
        if not self._scores:
            return
        allowed = num_borders(self._num_frames, self._frames_per_cube) - (len(self._borders) - 1)
        begin = self._num_frames - len(self._open)
        for border in self._chosen(max(0, allowed)):
            self._cubes.append(self._network.resampler(self._open[: border - begin]))
            self._open, begin = self._open[border - begin :].clone(), border
            self._begin(border, self._open[0])
        self._scores = []
        self._show()

    def _chosen(self, count: int) -> list[int]:
        """The frames of this window at which cubes begin, in order."""
        scores, first = torch.stack(self._scores), self._num_frames - len(self._scores)
        if self._uniform:
            return [first - 1 + i * (len(scores) + 1) // (count + 1) for i in range(1, count + 1)]
        return sorted(first + i for i in ints(scores.sort(descending=True, stable=True).indices[:count]))

    def _show(self) -> None:
        if self._thumbnail is None:
            self._thumbnail = self._network.shown(self._first_frames / len(self._borders))

    @torch.no_grad()
    def decide(self) -> Reduction:
        """The decision about all frames. None may follow."""
        self._settle()
        self._show()
        self._cubes.append(self._network.resampler(self._open))
        return self._reduction(self._num_frames)

    def _reduction(self, end: int) -> Reduction:
        """The thumbnail and the cubes that are done, which end before frame `end`."""
        assert self._like is not None
        assert self._thumbnail is not None
        shape, thumbnail, dtype = self._network.shape, self._thumbnail, self._like.embeddings.dtype
        borders = self._borders[: len(self._cubes)]
        digits, cells = self._network.get_buffer("digits"), ints(query_cells(shape))
        lengths = [after - begin for begin, after in zip(borders, [*borders[1:], end], strict=True)]
        first = [*range(len(thumbnail))]
        rows, keep, offsets, sizes = [thumbnail], [*first], [*first], [NOTHING] * len(first)
        for i, (border, tokens) in enumerate(zip(borders, self._cubes, strict=True)):
            written = [int(digit) for digit in str(border)]
            start, cell = len(thumbnail) + i * shape.side**2, border * shape.side**2 + (len(thumbnail) if not i else 0)
            rows += [digits[written], tokens]
            keep += [*range(cell, cell + len(written)), *(border * shape.side**2 + each for each in cells)]
            offsets += [*range(start, start + len(written)), *(start + each for each in cells)]
            share = lengths[i] * shape.side**2 / len(cells)
            sizes += [NOTHING] * len(written) + [share] * len(cells)
        device = thumbnail.device
        return Reduction(
            keep=torch.tensor(keep, device=device),
            embeddings=torch.cat(rows).to(dtype),
            sizes=torch.tensor(sizes, device=device),
            placement=Placement(offsets=torch.tensor(offsets), advance=len(thumbnail) + len(borders) * shape.side**2),
            borders=tuple(borders),
        )

    @torch.no_grad()
    def settled(self) -> VisualTokens | None:
        """The tokens that no later frame changes: those of all cubes but the last, once the first window is over."""
        if self._thumbnail is None or not self._cubes:
            return None
        assert self._like is not None
        end = self._borders[len(self._cubes)]
        return rewritten(self._reduction(end), self._like, end)

    def finish(self) -> VisualTokens:
        """What is left of the clip."""
        assert self._like is not None
        return rewritten(self.decide(), self._like, self._num_frames)
