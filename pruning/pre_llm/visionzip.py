"""VisionZip: keep the tokens the tower looks at, and merge the others into a few that stand for the rest.

Paper     "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv:2412.04467
          (training-free).
Stage     pre_llm, after the projector; within each crop or frame.
Needs     attention_received and tower_keys, of the block that the features come from.
Cost      one attention row (column means without [CLS]); O(N c dh) for the assignment.
Equation  with k = d + c: dominant = the d largest sum_h A[h, j]. Of the others, in reading order, every
          floor(rest / c)-th one is a target, c in all; each of the rest joins the target whose mean key has the largest
          cosine with its own. A target x_t becomes the mean of itself and those that joined it, in its own place
          (`merge`: "mean", the paper's text), or x_t + mean of those that joined it ("target_plus_mean", the authors'
          code, which made the published figures; such a token is up to twice as long as any).
Positions authors: numbered anew in LLaVA models, kept in Qwen's (`vision.positions`: "as_published"); here kept.
Differs   from the authors' code, which merges before the projector, where here tokens are merged after it; [CLS] is
          never among the tokens, so d counts patches. Where the model merges 2 x 2 patches, scores and keys are their
          means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mm.data.tokens import PublishedPositions, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.features import ATTENTION_RECEIVED, TOWER_KEYS
from mm.plugins.finite import finite
from mm.plugins.reducer import ReduceContext, Reduction
from pruning.base import choice_option, merge_means, top_k_ascending, unit_rows
from pruning.helpers.steps import Step, StepReducer


@dataclass(frozen=True, kw_only=True)
class VisionZip(StepReducer):
    """Keep what the tower looks at, and merge the rest into a few tokens (VisionZip).

    Attributes:
        keep_ratio: Tokens kept / tokens in, merged ones included, in (0, 1].
        contextual_ratio: Of the kept tokens, the share that others are merged into, in [0, 1); 10 of 64 in the paper.
        merge: "mean" of a target and those that joined it, or "target_plus_mean", as the authors' code has it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_RECEIVED, TOWER_KEYS})
    published_positions: ClassVar[PublishedPositions] = "compact"
    contextual_ratio: float = 0.15625
    merge: Literal["mean", "target_plus_mean"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.contextual_ratio
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InvalidOption("VisionZip", "contextual_ratio", f"has to be a number from 0 to below 1, got {share!r}")
        choice_option("visionzip", "merge", self.merge, ("mean", "target_plus_mean"))

    @property
    def rewrites(self) -> bool:
        """Whether tokens are sums, which no weights that add up to 1 describe."""
        return self.merge == "target_plus_mean"

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        reduction = super().after_encode(tokens, context)
        if self.merge == "mean" or reduction.merge is None:
            return reduction
        return target_plus_mean(finite(reduction, tokens, "visionzip"), tokens)

    def decide(self, step: Step, k: int) -> Reduction:
        num_contextual = min(k - 1, math.floor(k * self.contextual_ratio + 0.5))
        dominant = top_k_ascending(step.aux_features[ATTENTION_RECEIVED].float().sum(dim=0), k - num_contextual)
        if not num_contextual:
            return Reduction(keep=dominant)
        rest, targets, joins = contextual(step.aux_features[TOWER_KEYS].T, dominant, num_contextual)
        keep, order = torch.cat([dominant, rest[targets]]).sort()
        row_of = torch.argsort(order)
        rows = torch.cat([row_of[: len(dominant)], row_of[len(dominant) :][joins]])
        return merge_means(keep, rows, torch.cat([dominant, rest]), step.sizes)


def target_plus_mean(reduction: Reduction, tokens: VisualTokens) -> Reduction:
    """Of means that include their targets: each target plus the mean of the others, if there are others."""
    assert reduction.merge is not None
    assert reduction.sizes is not None
    targets = tokens.embeddings.index_select(0, reduction.keep).float()
    own = tokens.sizes.index_select(0, reduction.keep).unsqueeze(1)
    others = reduction.sizes.unsqueeze(1) - own
    sums = (reduction.merge @ tokens.embeddings.float().nan_to_num(0, 0, 0)) * (own + others)
    added = torch.where(others > 0, targets + (sums - own * targets) / others.clamp_min(1), targets)
    return replace(reduction, merge=None, embeddings=added.to(tokens.embeddings.dtype))


def contextual(keys: Tensor, dominant: Tensor, num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are merged into which.

    Args:
        keys: (N, dh), one per token.
        dominant: (d,) tokens that stay as they are.
        num_targets: c, at most N - d.

    Returns:
        The remaining tokens in reading order (N - d,); which of these are targets (c,); for each of them, the number of
        the target it belongs to (N - d,), a target's own among them.
    """
    stays = torch.zeros(keys.shape[0], dtype=torch.bool, device=keys.device)
    stays[dominant] = True
    num_rest = keys.shape[0] - dominant.shape[0]
    rest = torch.sort(stays, stable=True).indices[:num_rest]  # not nonzero, which a GPU would be waited for
    targets = torch.arange(num_targets, device=keys.device) * (num_rest // num_targets)
    metric = unit_rows(keys.index_select(0, rest))
    joins = torch.argmax(metric @ metric.index_select(0, targets).T, dim=1)
    joins[targets] = torch.arange(num_targets, device=keys.device)
    return rest, targets, joins
