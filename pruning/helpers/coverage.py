"""Greedy maximum coverage, as several methods use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_COLUMNS = 256
"""Gains are computed for so many candidates at a time: a second matrix of all of them would only be memory."""

BROKEN = -1e30
"""Ranks a candidate below all others, and above those that are chosen."""


@torch.no_grad()
def most_covering(covers: Tensor, handicap: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(k,) int64 and (k,) float32: the candidates that cover most, in the order they are chosen, and their gains.

    k times: argmax over the candidates not yet chosen of sum_r max(0, covers_rj - v_r) + handicap_j, then
    v = max(v, covers_.j), with v = 0 at first. The lowest index wins a tie.

    Args:
        covers: (R, N) float32, how well candidate j covers row r.
        handicap: (N,), minus infinity for candidates that are chosen only when no other is left.
        k: At most N.
    """
    columns = covers.T.contiguous()
    left = torch.where(torch.isfinite(handicap), handicap, BROKEN)
    covered = columns.new_zeros(columns.shape[1])
    chosen = torch.empty(k, dtype=torch.int64, device=columns.device)
    gains, total = columns.new_empty(k), columns.new_empty(columns.shape[0])
    for step in range(k):
        for start in range(0, columns.shape[0], BLOCK_COLUMNS):
            block = columns[start : start + BLOCK_COLUMNS]
            torch.sum((block - covered).clamp_min_(0), dim=1, out=total[start : start + BLOCK_COLUMNS])
        torch.max(total + left, dim=0, out=(gains[step], chosen[step]))
        latest = chosen[step : step + 1]
        covered = torch.maximum(covered, columns.index_select(0, latest).squeeze(0))
        left.index_fill_(0, latest, -math.inf)
    return chosen, gains
