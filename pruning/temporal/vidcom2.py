"""VidCom2: keep the tokens of a clip that resemble neither the clip nor their frame, more of them in unusual frames.

Paper     "Video Compression Commander: Plug-and-Play Inference Acceleration for Video LLMs", EMNLP 2025,
          arXiv:2505.14454 (training-free).
Stage     temporal, after the projector; clips only.
Needs     nothing but the embeddings.
Cost      O(F n D).
Equation  u = rows of length 1 over the floor(D / 2) channels of lowest variance; kernel
          K(u, c) = sum_{e=-3..1} exp(-|u - c|^2 / (2 * 2^e)); v = K(u, mean of all), s = v + K(u, mean of its frame).
          A frame's share is p = softmax(-mean v / 0.01) over frames, scale_t = min(1, keep_ratio (1 + p_t - mean p));
          it keeps its max(1, half_even(scale_t n)) lowest s. Then, to exactly max(F, floor(F n keep_ratio)): of too
          many the highest s go, of too few the lowest s are added.
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code in the exact total, which is vLLM's. So low a temperature makes p a single 1 on most
          clips: one frame gets about twice the share of the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions
from mm.plugins.reducer import ReduceContext, Reduction
from pruning.base import Rounding, budget
from pruning.helpers.clips import ClipReducer

TEMPERATURE = 0.01
BANDWIDTHS = tuple(2.0**e for e in range(-3, 2))


@dataclass(frozen=True, kw_only=True)
class VidCom2(ClipReducer):
    """Keep what resembles neither the clip nor its frame (VidCom2).

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1]; never less than one token per frame.
    """

    rounding: ClassVar[Rounding] = "floor_complement"
    published_positions: ClassVar[PublishedPositions] = "compact"

    def num_kept(self, num_frames: int, num_per_frame: int) -> int:
        return max(num_frames, budget(num_frames * num_per_frame, self.keep_ratio, self.rounding))

    def decide(self, frames: Tensor, context: ReduceContext, k: int) -> Reduction:
        to_clip, resemblance = likeness(frames)
        kept = _rank(resemblance) < frame_shares(to_clip, self.keep_ratio).unsqueeze(1)
        # In each group the least alike first; the frames' own choice before all others.
        order = torch.sort(resemblance.flatten(), stable=True).indices
        order = order[torch.sort(~kept.flatten()[order], stable=True).indices]
        return Reduction(keep=order[:k].sort().values)


def likeness(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(F, n) float32 each: how much a token of `frames` (F, n, D) resembles the clip, and the sum with how much it
    resembles its frame, infinite where the token is not finite.
    """
    values = frames.float()
    broken = ~torch.isfinite(values).all(dim=-1, keepdim=True)
    values = values.masked_fill(broken, 0.0)
    unit = torch.nn.functional.normalize(values[..., steady_channels(values.flatten(0, 1))], dim=-1, eps=1e-12)
    to_clip = _kernel(unit, unit.mean(dim=(0, 1)))
    to_frame = _kernel(unit, unit.mean(dim=1, keepdim=True))
    return to_clip, (to_clip + to_frame).masked_fill(broken.squeeze(-1), math.inf)


def steady_channels(values: Tensor) -> Tensor:
    """The half of the channels of `values` (N, D) that vary least, the earliest of equals."""
    half = max(1, values.shape[1] // 2)
    return torch.sort(values.var(dim=0, correction=0), stable=True).indices[:half]


def frame_shares(to_clip: Tensor, keep_ratio: float) -> Tensor:
    """(F,): how many tokens each frame keeps by itself, from the likeness of its tokens to the clip (F, n)."""
    unlike = -to_clip.mean(dim=1)
    share = torch.softmax((unlike - unlike.max()) / TEMPERATURE, dim=0)
    scale = (keep_ratio * (1 + share - share.mean())).clamp_max(1)
    return (scale * to_clip.shape[1]).round().clamp_min(1)


def _kernel(unit: Tensor, center: Tensor) -> Tensor:
    squared = (unit - center).square().sum(dim=-1)
    return sum((torch.exp(-squared / (2 * width)) for width in BANDWIDTHS), torch.zeros_like(squared))


def _rank(scores: Tensor) -> Tensor:
    """Place of each of `scores` (F, n) within its row, lowest first, the earliest of equals."""
    return torch.argsort(torch.argsort(scores, dim=1, stable=True), dim=1)
