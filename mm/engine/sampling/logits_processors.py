"""From a model's logits to the law that tokens are drawn from, for several rows at once.

The order is the field's: logit_bias, repetition penalty, frequency and presence penalties; what is not allowed;
temperature, top_k, top_p, min_p (Hugging Face's order; top_p counts what top_k left). All rows have their own
parameters. Every step works within a row, and a row's way does not depend on its neighbours, so alone and in any batch
it comes out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_SUMMED = 256
"""Tokens whose probabilities are summed first; most nuclei end among them."""
COLDEST = 1e-30
"""Divisor for temperatures below it, whose law is the same: float32 cannot hold quotients by smaller numbers."""


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What is taken from the logits of some tokens of one row; each field (n,), token ids without repetition."""

    token_ids: np.ndarray
    counts: np.ndarray
    repetition: float
    frequency: float
    presence: float


def add_biases(logits: Tensor, rows: Sequence[int], biases: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Add each (token ids, values) of `biases` to its row of `logits` (B, vocab), in place."""
    at = _places(logits, rows, [token_ids for token_ids, _ in biases])
    logits[at] += torch.from_numpy(np.concatenate([values for _, values in biases])).to(logits)


def penalise(logits: Tensor, rows: Sequence[int], penalties: Sequence[Penalty]) -> None:
    """Apply each of `penalties` to its row of `logits` (B, vocab), in place.

    Repetition as in CTRL (arXiv:1909.05858, as Hugging Face has it), then frequency and presence as OpenAI has them.
    """
    at = _places(logits, rows, [penalty.token_ids for penalty in penalties])
    lengths = [len(penalty.token_ids) for penalty in penalties]
    terms = np.array([(p.repetition, p.frequency, p.presence) for p in penalties], dtype=np.float32)
    repetition, frequency, presence = torch.from_numpy(np.repeat(terms, lengths, axis=0)).to(logits).unbind(1)
    counts = torch.from_numpy(np.concatenate([penalty.counts for penalty in penalties])).to(logits)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - frequency * counts - presence * (counts > 0)


def _places(logits: Tensor, rows: Sequence[int], token_ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(row, column) indices of the tokens of several rows."""
    row = np.repeat(np.asarray(rows, dtype=np.int64), [len(ids) for ids in token_ids])
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(np.concatenate(token_ids)).to(logits.device)


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Temperature (above 0) and truncation of one row; the values that change nothing are the defaults."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def warp(logits: Tensor, warps: Sequence[Warp]) -> Tensor:
    """Log-probabilities (B, vocab) float32, -inf where a token cannot be drawn.

    Tokens as probable as the last one that top_k or top_p keeps are kept too, so the order of ids never decides.

    Args:
        logits: (B, vocab) float32; each row's largest is finite.
    """
    divisors = _column([max(warp.temperature, COLDEST) for warp in warps], logits)
    # Less its maximum first: a tiny divisor then sends the others to -inf, and none to NaN.
    law = ((logits - logits.amax(-1, keepdim=True)) / divisors).log_softmax(-1)
    cut = [i for i, warp in enumerate(warps) if warp.truncates]
    if not cut:
        return law
    whole = len(cut) == len(warps)
    rows = law if whole else law[cut]
    rows = rows.masked_fill(rows < _floor(rows, [warps[i] for i in cut]), -torch.inf).log_softmax(-1)
    if whole:
        return rows
    law[cut] = rows
    return law


def _floor(law: Tensor, warps: Sequence[Warp]) -> Tensor:
    """(B, 1): the log-probability of the least probable token that stays."""
    floor = law.amax(-1, keepdim=True) + _column([warp.min_p for warp in warps], law).log()
    rows = [i for i, warp in enumerate(warps) if warp.top_k > 0 or warp.top_p < 1]
    if rows:
        least = _least_kept(_descending(law[rows]), [warps[i] for i in rows], NUM_SUMMED)
        floor[rows] = torch.maximum(floor[rows], least)
    return floor


def _descending(law: Tensor) -> Tensor:
    """Each row's values, the largest first. numpy sorts 49k of them in 0.09 ms on a CPU core, torch in 2.8 ms."""
    if law.device.type != "cpu":
        return law.sort(descending=True).values
    return torch.from_numpy(np.sort(-law.numpy(), axis=-1)).neg_()


def _least_kept(ordered: Tensor, warps: Sequence[Warp], num_summed: int) -> Tensor:
    """(B, 1): the least log-probability that top_k, and top_p within it, keep.

    Looks at `num_summed` tokens first; a row for which they are too few is done again with all.
    """
    vocab = ordered.shape[1]
    first = ordered[:, :num_summed]
    top_k = torch.tensor([min(warp.top_k, vocab) or vocab for warp in warps], device=ordered.device).unsqueeze(1)
    top_p = _column([warp.top_p for warp in warps], ordered).double()
    kth = torch.where(top_k < vocab, ordered.gather(1, top_k - 1), -torch.inf)
    probs = first.double().exp()
    # What top_p counts: everything that top_k leaves, which is all of it in rows without top_k.
    mass = torch.where(top_k < vocab, (probs * (first >= kth)).sum(-1, keepdim=True), 1.0)
    inside = (probs.cumsum(-1) - probs < top_p * mass).sum(-1, keepdim=True)
    least = torch.where(top_p < 1, torch.maximum(first.gather(1, inside - 1), kth), kth)
    if num_summed < vocab:
        # What goes on behind the tokens looked at: a nucleus, or tokens as probable as the k-th.
        more = (top_p < 1) & torch.where(top_k < vocab, first[:, -1:] >= kth, inside == num_summed)
        if unsure := more.squeeze(1).nonzero().squeeze(1).tolist():
            least[unsure] = _least_kept(ordered[unsure], [warps[i] for i in unsure], vocab)
    return least


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
